package main

import (
	"context"
	"fmt"
	"time"

	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Argo CD stops a script after this time.
const limit = time.Second

// The libraries that Argo CD gives to a script of a user: no string, no math, no io. (Its os has only the time.)
var libraries = []struct {
	name string
	open lua.LGFunction
}{
	{lua.LoadLibName, lua.OpenPackage},
	{lua.BaseLibName, lua.OpenBase},
	{lua.TabLibName, lua.OpenTable},
}

var known = map[string]bool{
	"Healthy": true, "Progressing": true, "Degraded": true, "Suspended": true, "Missing": true, "Unknown": true,
}

// A health is what Argo CD shows for one resource.
type health struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

// Check returns the health of an object as Argo CD has it: what is being deleted progresses, and the script is asked for the rest.
// https://github.com/argoproj/gitops-engine/blob/master/pkg/health/health.go
func check(ctx context.Context, object *unstructured.Unstructured, script string) (health, error) {
	if object.GetDeletionTimestamp() != nil {
		return health{Status: "Progressing", Message: "Pending deletion"}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for _, library := range libraries {
		open := lua.P{Fn: state.NewFunction(library.open), Protect: true}
		if err := state.CallByParam(open, lua.LString(library.name)); err != nil {
			return health{}, err
		}
	}
	state.SetContext(ctx)
	state.SetGlobal("obj", convert(state, object.Object))
	if err := state.DoString(script); err != nil {
		return health{}, err
	}
	return read(state.Get(-1))
}

func read(value lua.LValue) (health, error) {
	table, isTable := value.(*lua.LTable)
	if !isTable {
		return health{}, fmt.Errorf("the script returns %s, not a table", value.Type())
	}
	found := health{Status: lua.LVAsString(table.RawGetString("status")), Message: lua.LVAsString(table.RawGetString("message"))}
	if !known[found.Status] {
		return health{}, fmt.Errorf("%q is no health", found.Status)
	}
	return found, nil
}

func convert(state *lua.LState, value any) lua.LValue {
	switch value := value.(type) {
	case bool:
		return lua.LBool(value)
	case string:
		return lua.LString(value)
	case int64:
		return lua.LNumber(value)
	case float64:
		return lua.LNumber(value)
	case []any:
		table := state.CreateTable(len(value), 0)
		for _, each := range value {
			table.Append(convert(state, each))
		}
		return table
	case map[string]any:
		table := state.CreateTable(0, len(value))
		for key, each := range value {
			table.RawSetString(key, convert(state, each))
		}
		return table
	}
	return lua.LNil
}
