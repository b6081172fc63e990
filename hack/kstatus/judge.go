package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func readEvaluators(checks files) (map[string]*cel.StatusEvaluator, error) {
	texts, err := checks.read()
	if err != nil {
		return nil, err
	}
	evaluators := map[string]*cel.StatusEvaluator{}
	for name, text := range texts {
		var expressions kustomize.HealthCheckExpressions
		if err := json.Unmarshal([]byte(text), &expressions); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if evaluators[name], err = cel.NewStatusEvaluator(&expressions); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return evaluators, nil
}

func judge(
	ctx context.Context, object *unstructured.Unstructured, evaluators map[string]*cel.StatusEvaluator, scripts map[string]string,
) (verdict, error) {
	computed, err := status.Compute(object)
	if err != nil {
		return verdict{}, fmt.Errorf("kstatus: %w", err)
	}
	answer := verdict{Kstatus: computed.Status.String(), Flux: map[string]string{}, Argo: map[string]health{}}
	for name, evaluator := range evaluators {
		answer.Flux[name] = evaluate(ctx, evaluator, object)
	}
	for name, script := range scripts {
		if answer.Argo[name], err = check(ctx, object, script); err != nil {
			return verdict{}, fmt.Errorf("argo %s: %w", name, err)
		}
	}
	return answer, nil
}

// Evaluate returns the status by Flux's expressions. An error is an answer too: Flux waits until its time is over.
func evaluate(ctx context.Context, evaluator *cel.StatusEvaluator, object *unstructured.Unstructured) string {
	result, err := evaluator.Evaluate(ctx, object)
	if err != nil {
		return "Error: " + err.Error()
	}
	return result.Status.String()
}
