{{- define "finetune-operator.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Name of a resource that has no namespace: releases in several namespaces must not collide. */}}
{{- define "finetune-operator.clusterName" -}}
{{- printf "%s-%s" (include "finetune-operator.fullname" .) .Release.Namespace -}}
{{- end -}}

{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "finetune-operator.labels" -}}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Reference of an image, from the list of the root and the image's values. */}}
{{- define "finetune-operator.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository ($image.tag | default $root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.tlsSecretName" -}}
{{- $fullname := include "finetune-operator.fullname" . -}}
{{- $made := printf "%s-%s" $fullname (ternary "certificate" "tls" .Values.tls.certManager.enabled) -}}
{{- .Values.tls.existingSecret | default $made -}}
{{- end -}}

{{/* Names by which trainer pods may reach the report receiver, as a JSON list. */}}
{{- define "finetune-operator.dnsNames" -}}
{{- $service := printf "%s.%s.svc" (include "finetune-operator.fullname" .) .Release.Namespace -}}
{{- list $service (printf "%s.cluster.local" $service) | toJson -}}
{{- end -}}

{{/* What selects the pods of all FineTuneJobs of a namespace. */}}
{{- define "finetune-operator.trainers" -}}
matchLabels:
  app.kubernetes.io/managed-by: finetune-operator
matchExpressions:
  - {key: finetune.dev/job, operator: Exists}
{{- end -}}

{{/* Egress to name servers, wherever the cluster has them. */}}
{{- define "finetune-operator.dnsEgress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}
