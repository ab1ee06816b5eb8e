package fsck

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"varve.dev/layout"
)

// What keys must look like, by bucket (M3).

func metaKey(key string) error {
	keys := []string{layout.MetaKey, layout.StateKey, layout.RebuiltKey, layout.CheckedKey, layout.CheckingKey, layout.ScrubbingKey}
	if !slices.Contains(keys, key) {
		return fmt.Errorf("the keys are %q", keys)
	}
	return nil
}

func blobKey(key string) error {
	_, err := layout.ParseBlobDigest(key)
	return err
}

// elementKey is a key that is the name of a directory as well.
func elementKey(key string) error {
	if !layout.IsElement(key) {
		return errors.New("it cannot be the name of a file")
	}
	return nil
}

func layerIndexKey(key string) error {
	for _, prefix := range []string{layout.DiffKey(""), layout.ChainKey("")} {
		if id, ok := strings.CutPrefix(key, prefix); ok {
			return blobKey(id)
		}
	}
	return errors.New("it is neither a DiffID's nor a ChainID's")
}

func measureKey(key string) error {
	if !layout.IsMeasured(key) {
		return errors.New("it is no directory that is measured")
	}
	return nil
}

func nameKey(key string) error { return layout.CheckName("key", key) }

var (
	kinds = []string{
		layout.KindBlob, layout.KindLayer, layout.KindActive, layout.KindSnapshot, layout.KindImage,
		layout.KindContainer, layout.KindLease, layout.KindCache, layout.KindIntent, layout.KindAPI,
	}
	relations = []string{
		layout.RelTarget, layout.RelContent, layout.RelUnpacked, layout.RelParent, layout.RelTree,
		layout.RelFiles, layout.RelHolds, layout.RelRootfs, layout.RelResult,
	}
)

func validEdge(e layout.Edge) error {
	for _, n := range []layout.Node{e.Parent, e.Child} {
		if kind, id := n.Split(); !slices.Contains(kinds, kind) || id == "" {
			return fmt.Errorf("%q is no node", string(n))
		}
	}
	if !slices.Contains(relations, e.Rel) {
		return fmt.Errorf("%q is no relation", e.Rel)
	}
	return nil
}
