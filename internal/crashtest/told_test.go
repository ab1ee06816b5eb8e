package crashtest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"varve.dev/layout"
	"varve.dev/runtime"
)

// What a ledger says of a name beside a digest.
const (
	gone  = ""     // it is not there
	anyOf = "*"    // it is there, whatever it stands for
	ran   = "ran"  // a container that has run to its end
	made  = "made" // a container that may never have been started
)

// told is the ledger of a store: what commands were told by exit code 0. A
// command that was killed, or that lost the process it asked, leaves what it
// was to change in doubt until the store is looked at.
type told struct {
	images     map[string][]string // name → what it may stand for
	containers map[string][]string // name → ran, made or gone
}

func newTold() told {
	return told{images: map[string][]string{}, containers: map[string][]string{}}
}

// is what a name stands for, if there is no doubt.
func (l told) is(image string) string {
	if is := l.images[image]; len(is) == 1 {
		return is[0]
	}
	return gone
}

// present returns those of the names that are images.
func (l told) present(names []string) (there []string) {
	for _, n := range names {
		if l.is(n) != gone {
			there = append(there, n)
		}
	}
	return there
}

// enter notes what became of a command.
func (l told) enter(o order, acknowledged bool) {
	for name, now := range o.images {
		if !acknowledged {
			l.images[name] = append([]string{l.is(name)}, now)
		} else {
			l.images[name] = []string{now}
		}
	}
	switch {
	case o.container == "":
	case !acknowledged:
		l.containers[o.container] = []string{gone, made}
	case o.stays:
		l.containers[o.container] = []string{ran}
	default:
		l.containers[o.container] = []string{gone}
	}
}

// settle compares what is there with a ledger, and takes it over.
func settle(what string, ledger map[string][]string, there map[string]string) (wrong []string) {
	for name := range there {
		if ledger[name] == nil {
			ledger[name] = []string{gone}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(ledger)) {
		is, may := there[name], ledger[name]
		if !slices.Contains(may, is) && (is == gone || !slices.Contains(may, anyOf)) {
			wrong = append(wrong, fmt.Sprintf("%s %s is %q, acknowledged is %q", what, name, is, may))
		}
		ledger[name] = []string{is}
	}
	return wrong
}

// settleImages compares what `varve images` prints.
func (l told) settleImages(printed string) []string {
	there := map[string]string{}
	for line := range strings.Lines(printed) {
		if f := strings.Fields(line); len(f) > 1 && f[0] != "NAME" {
			there[f[0]] = f[1]
		}
	}
	return settle("image", l.images, there)
}

// settleContainers compares the records, and looks at what the containers that
// were acknowledged have written.
func (l told) settleContainers(root string, r records) (wrong []string) {
	there := map[string]string{}
	for id, c := range r.containers {
		there[c.Name] = made
		if !slices.Equal(l.containers[c.Name], []string{ran}) {
			continue
		}
		there[c.Name] = ran
		exit, err := runtime.ReadExit(filepath.Join(root, layout.ContainerPath(layout.ContainerID(id))))
		if err != nil || exit.Code != 0 {
			wrong = append(wrong, fmt.Sprintf("container %s: its exit is %d, %v", c.Name, exit.Code, err))
		}
		tree := filepath.Join(root, layout.ActivePath(r.snapshots[string(c.Snapshot)].Layer), layout.TreeDir)
		if data, err := os.ReadFile(filepath.Join(tree, "made")); err != nil || string(data) != c.Name+"\n" {
			wrong = append(wrong, fmt.Sprintf("container %s: what it wrote is %q, %v", c.Name, data, err))
		}
	}
	return append(wrong, settle("container", l.containers, there)...)
}
