package buildkit

import (
	"fmt"
	"strconv"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/moby/buildkit/client"

	"varve.dev/errdefs"
)

// filterOf reads filters in containerd's form; one of them has to match.
func filterOf(list []string) (func(client.UsageInfo) bool, error) {
	f, err := filters.ParseAll(list...)
	if err != nil {
		return nil, fmt.Errorf("filter: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return func(u client.UsageInfo) bool {
		return f.Match(filters.AdapterFunc(func(path []string) (string, bool) {
			if len(path) == 0 {
				return "", false
			}
			switch path[0] {
			case "id":
				return u.ID, u.ID != ""
			case "parents":
				for _, p := range u.Parents {
					return p, true
				}
				return "", false
			case "description":
				return u.Description, u.Description != ""
			case "type":
				return string(u.RecordType), u.RecordType != ""
			case "inuse":
				return strconv.FormatBool(u.InUse), u.InUse
			case "mutable":
				return strconv.FormatBool(u.Mutable), u.Mutable
			case "shared":
				return strconv.FormatBool(u.Shared), u.Shared
			case "private":
				return strconv.FormatBool(!u.Shared), !u.Shared
			}
			return "", false
		}))
	}, nil
}
