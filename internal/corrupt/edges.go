package corrupt

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	bolt "go.etcd.io/bbolt"
)

// References, which stand in the database twice.
var edgeKinds = []Kind{
	{"wrong edge", "an edge leads to another blob, layer or snapshot than it has to", wrongEdge},
	{"half an edge", "an edge is stored in one direction only", eachEdge(func(edge) bool { return true }, func(s *store, e edge) error {
		s.must("E1", e.object(), "")
		if s.coin() {
			s.did("%s is not stored child first", e.object())
			s.must("M4", theLog, logFile)
			return s.update(deleting("edges", e.key()))
		}
		s.did("%s is not stored parent first", e.object())
		return s.update(deleting("edgesback", e.back()))
	})},
	{"lost edge", "an edge that a record calls for is gone", eachEdge(structural, func(s *store, e edge) error {
		s.did("%s deleted", e.object())
		s.must("E3", e.object(), "")
		return s.noLonger(e)
	})},
	{"lost content edge", "a manifest does not hold its config any more", eachEdge(func(e edge) bool { return e.rel == "content" }, func(s *store, e edge) error {
		s.did("%s deleted", e.object())
		return s.noLonger(e)
	})},
	{"edge to nowhere", "an edge leads to what does not exist, or comes from there", eachEdge(func(edge) bool { return true }, func(s *store, e edge) error {
		kind, _, _ := strings.Cut(e.child, ":")
		lost := edge{e.parent, e.rel, kind + ":sha256:" + s.hex(64)}
		if s.coin() {
			lost = edge{"image:nobody:" + s.hex(4), "target", e.child}
		}
		s.did("%s is there", lost.object())
		s.must("E2", lost.object(), "")
		s.may(Finding{Invariant: "E3", Object: lost.object()})
		return s.commit(lost.put()...)
	})},
	{"needless edge", "an edge is there that no record calls for", eachEdge(structural, func(s *store, e edge) error {
		other, err := s.otherChild(e)
		if err != nil {
			return err
		}
		more := edge{e.parent, e.rel, other}
		s.did("%s is there", more.object())
		s.must(needless(more), more.object(), "")
		return s.commit(more.put()...)
	})},
	{"wrong use", "what an image or a container needs is not booked as that, or what nobody needs is", func(s *store) error {
		s.must("E5", "uses", "")
		if s.coin() {
			keys, err := s.keys("uses")
			if err != nil {
				return err
			}
			key, err := pickOne(s, "use", keys)
			if err != nil {
				return err
			}
			s.did("%s deleted", recordObject("uses", key))
			return s.update(deleting("uses", key))
		}
		e := edge{"image:nobody:" + s.hex(4), "target", "blob:sha256:" + s.hex(64)}
		s.did("%s is booked", e.object())
		return s.update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("uses")).Put([]byte(e.key()), nil) })
	}},
	{"edge of no kind", "an edge is of a relation, or between things, that the format does not know", eachEdge(func(edge) bool { return true }, func(s *store, e edge) error {
		bad := []edge{{e.parent, "likes", e.child}, {"thing:1", e.rel, e.child}, {e.parent, e.rel, "blob:"}, {e.parent, e.rel, "blob"}}[s.IntN(4)]
		s.did("%s is there", bad.object())
		s.must("M3", recordObject("edges", bad.key()), databaseFile)
		s.must("M3", recordObject("edgesback", bad.back()), databaseFile)
		return s.commit(bad.put()...)
	})},
}

// edge says that parent needs child.
type edge struct{ parent, rel, child string }

func (e edge) object() string { return fmt.Sprintf("edge %q -%s-> %q", e.parent, e.rel, e.child) }

func (e edge) key() string  { return strings.Join([]string{e.child, e.rel, e.parent}, "\x00") }
func (e edge) back() string { return strings.Join([]string{e.parent, e.rel, e.child}, "\x00") }

// put and drop are both halves of an edge, or some.
func (e edge) put() []change {
	there := json.RawMessage("true")
	return []change{{"edges", e.key(), there}, {"edgesback", e.back(), there}}
}

func (e edge) drop() []change {
	return []change{{Bucket: "edges", Key: e.key()}, {Bucket: "edgesback", Key: e.back()}}
}

// structural edges are those of one record to what it names.
func structural(e edge) bool {
	return slices.Contains([]string{"target", "parent", "tree", "files", "rootfs", "result"}, e.rel)
}

// edges returns every edge that does not end with an operation under way.
func (s *store) edges() (all []edge, err error) {
	keys, err := s.keys("edges")
	for _, k := range keys {
		if p := strings.Split(k, "\x00"); len(p) == 3 && !strings.HasPrefix(p[2], "lease:") {
			all = append(all, edge{parent: p[2], rel: p[1], child: p[0]})
		}
	}
	return all, err
}

// edgesOf returns those that begin or end at a node.
func (s *store) edgesOf(node string) ([]edge, error) {
	all, err := s.edges()
	return slices.DeleteFunc(all, func(e edge) bool { return e.parent != node && e.child != node }), err
}

func eachEdge(ok func(edge) bool, do func(*store, edge) error) func(*store) error {
	return func(s *store) error {
		all, err := s.edges()
		if err != nil {
			return err
		}
		e, err := pickOne(s, "edge", slices.DeleteFunc(all, func(e edge) bool { return !ok(e) }))
		if err != nil {
			return err
		}
		return do(s, e)
	}
}

// otherChild chooses another end of the same kind.
func (s *store) otherChild(e edge) (string, error) {
	kind, _, _ := strings.Cut(e.child, ":")
	for bucket, k := range nodeKind {
		if k != kind {
			continue
		}
		keys, err := s.keys(bucket)
		if err != nil {
			return "", err
		}
		key, err := pickOne(s, "other "+kind, slices.DeleteFunc(keys, func(key string) bool { return kind+":"+key == e.child }))
		return kind + ":" + key, err
	}
	return kind + ":" + s.hex(24), nil // the directory of a writable layer
}

// noLonger takes an edge away. What it was the last one to will be found.
func (s *store) noLonger(e edge) error {
	if err := s.unheld(e); err != nil {
		return err
	}
	return s.commit(e.drop()...)
}

// unheld notes that nothing else holds an edge's child, if that is so.
func (s *store) unheld(e edge) error {
	all, err := s.edgesOf(e.child)
	if err != nil {
		return err
	}
	held := slices.ContainsFunc(all, func(o edge) bool { return o.child == e.child && o != e })
	kind, _, _ := strings.Cut(e.child, ":")
	if !held && slices.Contains([]string{"blob", "layer", "snapshot"}, kind) {
		s.damage.Must = append(s.damage.Must, Finding{Invariant: "E4", About: e.child})
	}
	// A config's, or that of a layer that was not unpacked.
	s.may(Finding{Invariant: "E3", Object: e.object()})
	return nil
}

// needless is what an edge breaks that no record calls for: the directories of
// writable layers that otherChild makes up do not exist at all.
func needless(e edge) string {
	if strings.HasPrefix(e.child, "active:") {
		return "E2"
	}
	return "E3"
}

func wrongEdge(s *store) error {
	return eachEdge(structural, func(s *store, e edge) error {
		other, err := s.otherChild(e)
		if err != nil {
			return err
		}
		wrong := edge{e.parent, e.rel, other}
		s.did("%s leads to %s", e.object(), other)
		s.must("E3", e.object(), "")
		s.must(needless(wrong), wrong.object(), "")
		if err := s.unheld(e); err != nil {
			return err
		}
		return s.commit(append(e.drop(), wrong.put()...)...)
	})(s)
}
