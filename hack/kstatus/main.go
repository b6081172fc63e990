// Command kstatus tells what GitOps tools see in Kubernetes objects: kstatus, Flux's CEL health checks, Argo CD's Lua.
//
// It reads one JSON object a line on standard input and answers with one line each.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// A verdict holds what each tool says about one object.
type verdict struct {
	Kstatus string            `json:"kstatus"`
	Flux    map[string]string `json:"flux"`
	Argo    map[string]health `json:"argo"`
}

func main() {
	var checks, scripts files
	flag.Var(&checks, "flux", "NAME=PATH of the expressions of a Flux health check, as JSON; may be repeated")
	flag.Var(&scripts, "argo", "NAME=PATH of a custom health check of Argo CD, in Lua; may be repeated")
	flag.Parse()
	if err := run(os.Stdin, os.Stdout, checks, scripts); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(input io.Reader, output io.Writer, checks, scripts files) error {
	evaluators, err := readEvaluators(checks)
	if err != nil {
		return err
	}
	sources, err := scripts.read()
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(input)
	lines.Buffer(nil, 4<<20)
	encoder := json.NewEncoder(output)
	for number := 1; lines.Scan(); number++ {
		object := &unstructured.Unstructured{}
		// Its decoder keeps whole numbers whole, as the clients of the tools do.
		if err := object.UnmarshalJSON(lines.Bytes()); err != nil {
			return fmt.Errorf("line %d: %w", number, err)
		}
		answer, err := judge(context.Background(), object, evaluators, sources)
		if err != nil {
			return fmt.Errorf("line %d: %w", number, err)
		}
		if err := encoder.Encode(answer); err != nil {
			return err
		}
	}
	return lines.Err()
}

// Files maps the name of each file that was given to its path.
type files map[string]string

func (f *files) String() string { return fmt.Sprint(map[string]string(*f)) }

// Set takes NAME=PATH.
func (f *files) Set(value string) error {
	name, path, found := strings.Cut(value, "=")
	if !found {
		return fmt.Errorf("%q: give NAME=PATH", value)
	}
	if *f == nil {
		*f = files{}
	}
	(*f)[name] = path
	return nil
}

func (f files) read() (map[string]string, error) {
	texts := map[string]string{}
	for name, path := range f {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		texts[name] = string(text)
	}
	return texts, nil
}
