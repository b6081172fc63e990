"""Why the API server does not let a Job or a pod be (pure)."""

# Parts of the API server's messages, the telling ones first. Sources, in the folder staging/src/k8s.io of Kubernetes:
# apiserver/pkg/admission/plugin/{resourcequota,webhook,policy}, apiserver/pkg/admission/errors.go, pod-security-admission
_CAUSES = (
    ("does not serve ResourceClaimTemplate", "DeviceClaimsUnsupported", "accelerator.deviceClass needs Kubernetes 1.34 or later"),
    ("exceeded quota", "QuotaExceeded", "free some of the quota or have it raised; the operator tries again by itself"),
    ("failed quota", "QuotaExceeded", "the quota limits a resource that the pod does not ask for; ask its owner"),
    ("violates PodSecurity", "PodSecurityViolation", "ask for a namespace whose Pod Security level allows `restricted` pods"),
    ("failed calling webhook", "WebhookFailed", "the webhook does not answer; its owner has to mend it"),
    ("admission webhook", "AdmissionDenied", "ask the owner of the webhook"),
    ("ValidatingAdmissionPolicy", "AdmissionDenied", "ask the owner of the policy"),
    ("conflict with", "FieldConflict", "another manager has changed the object: undo that, or delete the object"),
    ("conflicts with", "FieldConflict", "other managers have changed the object: undo that, or delete the object"),
    ("is not this FineTuneJob's", "NameTaken", "delete it, or give it its labels back; the operator looks again by itself"),
    ("forbidden", "Forbidden", "ask the administrator of the cluster"),
)


def explain_refusal(message: str, *, subject: str) -> tuple[str, str]:
    """Return the reason in one word, and a message that names what was refused and what to do."""
    causes = ((reason, advice) for part, reason, advice in _CAUSES if part in message)
    reason, advice = next(causes, ("InvalidJob", "the message says which field"))
    return reason, f"{subject} is refused: {message.removeprefix('Error creating: ')} ({advice})"
