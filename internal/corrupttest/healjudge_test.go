package corrupttest

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"varve.dev/fsck"
	"varve.dev/internal/corrupt"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
	"varve.dev/repair"
)

// ways are those in which a damage ends, the last resort last: of a case that
// takes several, that one counts.
var ways = []string{"nothing to do", "opening", "file manifest", "records", "change log", "layer's tree", "own blob", "other layer", "registry", "left", "named", "quarantined"}

// wayOf tells how a repair ended.
func wayOf(said *repaired) string {
	way := 0
	is := func(name string) { way = max(way, slices.Index(ways, name)) }
	if slices.ContainsFunc(said.Report.Findings, func(f fsck.Finding) bool { return f.Healed }) {
		is("opening")
	}
	for _, f := range said.Plan.Left {
		if f.Severity != layout.Notice && slices.ContainsFunc(said.Report.Findings, func(g fsck.Finding) bool {
			return g.Invariant == f.Invariant && g.Object == f.Object && g.Path == f.Path && !g.Healed
		}) {
			is("left")
		}
	}
	for _, s := range said.Plan.Steps {
		is(wayOfStep(s))
	}
	return ways[way]
}

func wayOfStep(s *repair.Step) string {
	isLayer := slices.Contains([]string{"L1", "L3", "L4"}, s.Findings[0].Invariant)
	switch from := s.Done.From; {
	case !s.Done.Healed && (s.Done.Quarantine != "" || isLayer):
		return "quarantined"
	case !s.Done.Healed && strings.HasPrefix(s.Object, "blob "):
		return "named" // it is missing: there is nothing to put aside
	case !s.Done.Healed:
		return "left"
	case strings.HasSuffix(from, "registry"):
		return "registry"
	case strings.HasPrefix(from, "blob "):
		return "own blob"
	case strings.HasPrefix(from, "other files"):
		return "other layer"
	case strings.HasPrefix(from, "the tree of layer"):
		return "layer's tree"
	case from == "the change log":
		return "change log"
	case isLayer:
		return "file manifest"
	}
	return "records"
}

// broken are the images that a repair says it could not heal.
func (r *repaired) broken() (images []string) {
	for _, s := range r.Plan.Steps {
		images = append(images, s.Done.Breaks...)
	}
	return images
}

// judge holds a repaired store against the original and what was said of it.
func (c *healCase) judge(said *repaired) (wrong []string) {
	was := c.stores[c.mode.store]
	complain := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	ill := map[string]bool{} // objects that are said not to be whole
	for _, s := range said.Plan.Steps {
		if s.Done == nil {
			complain("%s: no step was taken", s.Object)
			continue
		}
		if s.Done.Healed {
			if s.Done.Error != "" || len(s.Done.Breaks) > 0 {
				complain("%s: healed, and yet: %+v", s.Object, s.Done)
			}
			continue
		}
		ill[s.Object] = true
		if want := was.on(s.Object); !slices.Equal(slices.Sorted(slices.Values(s.Done.Breaks)), want) {
			complain("%s: said to break %v, and breaks %v", s.Object, s.Done.Breaks, want)
		}
		if was.heals(c.mode, s.Object) {
			complain("%s was not healed: %s", s.Object, s.Done.Error)
		}
	}
	left, err := closed(c.store)
	if err != nil {
		return append(wrong, err.Error())
	}
	for _, f := range said.Plan.Left {
		ill[f.Object] = true
	}
	for _, f := range left {
		if !ill[f.Object] {
			complain("healed, and yet: %s %s at %q: %s", f.Invariant, f.Object, f.Path, f.Detail)
		}
	}
	if want := exitCode(left); said.code != want {
		complain("exit code %d, what is left makes it %d: %+v", said.code, want, left)
	}
	broken := said.broken()
	now := standingTrees(c.store)
	for _, image := range slices.Sorted(maps.Keys(was.trees)) {
		if now[image] != was.trees[image] && !slices.Contains(broken, image) {
			complain("image %s is not what it was, and nobody says so", image)
		}
	}
	return append(wrong, c.kept(said)...)
}

// heals tells whether an object has to be healed in a mode, whatever is wrong
// with it: a layer by its blob, or by others with the same contents; what an
// image needs by the registry.
func (o *original) heals(m mode, object string) bool {
	layer := strings.HasPrefix(object, "layer ")
	switch {
	case m.store == "same":
		return layer
	case m.store == "kept":
		return layer && len(o.on(object)) > 0
	}
	return m.registry && len(o.on(object)) > 0
}

// judgePulled tells what is wrong after what was broken has been pulled: every
// image is what it was, and what is still wrong is no image's.
func (c *healCase) judgePulled() (wrong []string) {
	was := c.stores[c.mode.store]
	now := standingTrees(c.store)
	for image, tree := range was.trees {
		if now[image] != tree {
			wrong = append(wrong, fmt.Sprintf("image %s is not what it was, after a pull", image))
		}
	}
	left, err := closed(c.store)
	if err != nil {
		return append(wrong, err.Error())
	}
	for _, f := range left {
		if f.Severity == layout.Notice || len(was.on(f.Object)) == 0 && strings.HasPrefix(f.Object, "layer ") {
			continue
		}
		wrong = append(wrong, fmt.Sprintf("after a pull: %s %s at %q: %s", f.Invariant, f.Object, f.Path, f.Detail))
	}
	return wrong
}

// served compares what the registry sent with what a repair says that it
// fetched: one blob at most.
func (c *healCase) served(said *repaired, registry *testkit.Proxy) (wrong []string) {
	var fetched int64
	for _, s := range said.Plan.Steps {
		fetched += s.Done.Fetched
		if s.Done.Fetched > s.Fetch {
			wrong = append(wrong, fmt.Sprintf("%s: %d bytes fetched, at most %d announced", s.Object, s.Done.Fetched, s.Fetch))
		}
	}
	blobs, bytes := map[string]bool{}, int64(0)
	for _, request := range registry.Requests() {
		digest := request[strings.LastIndex(request, "/")+1:]
		digest, _, _ = strings.Cut(digest, " ")
		if size, ok := c.stored(digest); ok && !blobs[digest] {
			blobs[digest] = true
			sent := registry.Sent(digest)
			bytes += sent
			if sent > size {
				wrong = append(wrong, fmt.Sprintf("%d bytes of %s, which has %d, were fetched", sent, digest, size))
			}
		}
	}
	if bytes != fetched || len(blobs) > 1 {
		wrong = append(wrong, fmt.Sprintf("%d bytes fetched, %d sent: %v", fetched, bytes, slices.Collect(maps.Keys(blobs))))
	}
	return wrong
}

// stored returns the size of a blob that the registry has.
func (c *healCase) stored(digest string) (int64, bool) {
	hex, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || len(hex) < 2 {
		return 0, false
	}
	fi, err := os.Stat(filepath.Join(c.registry.Storage, "docker/registry/v2/blobs/sha256", hex[:2], hex, "data"))
	if err != nil {
		return 0, false
	}
	return fi.Size(), true
}

// standing describes what is at the damaged paths.
func (c *healCase) standing() map[string]string {
	out := map[string]string{}
	for _, f := range slices.Concat(c.damage.Must, c.damage.OneOf) {
		if at, ok := pathOf(f); ok {
			if is, ok := contents(filepath.Join(c.store, at)); ok {
				out[at] = is
			}
		}
	}
	return out
}

// pathOf returns where the object of a finding stands in the store, if it is
// a blob or a file of a layer.
func pathOf(f corrupt.Finding) (string, bool) {
	id, isLayer := strings.CutPrefix(f.Object, "layer ")
	switch {
	case f.Invariant == "L4" && isLayer:
		return filepath.Join(layout.LayersDir, id, layout.TreeDir, f.Path), true
	case f.Invariant == "B2" || f.Invariant == "B3":
		return f.Path, true
	}
	return "", false
}

// contents describes a regular file or link by what it holds.
func contents(at string) (string, bool) {
	fi, err := os.Lstat(at)
	switch {
	case err != nil:
		return "", false
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(at)
		return "-> " + target, err == nil
	case fi.Mode().IsRegular():
		data, err := os.ReadFile(at)
		return layout.Algorithm.FromBytes(data).Encoded(), err == nil
	}
	return "", false
}

// kept tells what was taken out of the store and is not in quarantine, where
// the repair says it is.
func (c *healCase) kept(said *repaired) (wrong []string) {
	aside := map[string]bool{}
	for _, s := range said.Plan.Steps {
		if s.Done.Quarantine == "" {
			continue
		}
		if _, err := os.Stat(filepath.Join(c.store, s.Done.Quarantine, layout.QuarantineNote)); err != nil {
			wrong = append(wrong, "no note: "+err.Error())
		}
		_ = filepath.WalkDir(filepath.Join(c.store, s.Done.Quarantine), func(name string, _ fs.DirEntry, err error) error {
			if is, ok := contents(name); ok && err == nil {
				aside[is] = true
			}
			return nil
		})
	}
	for at, was := range c.bad {
		if is, _ := contents(filepath.Join(c.store, at)); is != was && !aside[was] {
			wrong = append(wrong, at+": what was bad is not in quarantine")
		}
	}
	return wrong
}

// standingTrees is trees of a store that may lack some.
func standingTrees(dir string) map[string]string {
	out, _ := trees(dir) // a layer's error is no original's hash
	return out
}
