package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/fsck/foreign"
)

// foreignStore is a store of another engine that fsck is to look at.
type foreignStore struct{ root string }

// ofFlags are the flags that name one.
var ofFlags = map[string]struct {
	engine foreign.Engine
	usage  string
}{
	"of-oci-layout": {foreign.OCILayout, "check an OCI image layout, a folder or a tar file, instead of the store"},
	"of-docker":     {foreign.Docker, "check a dockerd's data root (/var/lib/docker; storage driver overlay2) instead of the store"},
	"of-containerd": {foreign.Containerd, "check a containerd's root (/var/lib/containerd; snapshotter overlayfs) instead of the store"},
}

func (s *foreignStore) add(cmd *cobra.Command) {
	for name, f := range ofFlags {
		cmd.Flags().StringVar(&s.root, name, "", f.usage)
	}
}

// named tells whether one of the flags is given.
func (s *foreignStore) named(cmd *cobra.Command) bool {
	for name := range ofFlags {
		if cmd.Flags().Changed(name) {
			return true
		}
	}
	return false
}

// check prints what is wrong with the store, and ends with the code that says
// how bad it is.
func (s *foreignStore) check(cmd *cobra.Command, asJSON bool) error {
	report, err := s.run(cmd, asJSON)
	if err == nil && asJSON {
		var data []byte
		if data, err = json.Marshal(report); err == nil {
			err = printJSON(cmd.OutOrStdout(), string(data))
		}
	} else if err == nil {
		report.WriteText(cmd.OutOrStdout())
	}
	if err != nil {
		fmt.Fprintln(cmd.ErrOrStderr(), "varve:", err)
		return exitError(couldNotRun)
	}
	if code := report.ExitCode(); code != 0 {
		return exitError(code)
	}
	return nil
}

func (s *foreignStore) run(cmd *cobra.Command, asJSON bool) (*foreign.Report, error) {
	var given []string
	var engine foreign.Engine
	for name, f := range ofFlags {
		if cmd.Flags().Changed(name) {
			given, engine = append(given, "--"+name), f.engine
		}
	}
	for _, name := range []string{"deep", "quick", "list"} {
		if cmd.Flags().Changed(name) {
			given = append(given, "--"+name)
		}
	}
	if len(given) > 1 {
		return nil, errUsage("fsck: %s exclude each other", strings.Join(given, " and "))
	}
	show := newProgress(cmd.ErrOrStderr(), asJSON)
	defer show.finish()
	return foreign.Run(cmd.Context(), foreign.Options{
		Engine: engine, Root: s.root,
		Progress: func(done, total int64) {
			show.event(varve.Event{ID: "fsck", Name: string(engine), Phase: varve.Checking, Current: done, Total: total})
		},
	})
}
