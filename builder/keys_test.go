package builder

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/client/llb"

	"varve.dev/layer"
)

var update = flag.Bool("update", false, "write testdata/keys.txt")

// subjects are one operation of each kind, by name, and variations of them.
func subjects() map[string]llb.State {
	base := llb.Scratch().File(file("/base", "base"))
	other := llb.Scratch().File(dir("/other"))
	run := func(o ...llb.RunOption) llb.State {
		return base.Run(append([]llb.RunOption{llb.Args([]string{"cat", "/base"})}, o...)...).Root()
	}
	copied := func(from, to string, o ...llb.CopyOption) llb.State {
		return base.File(llb.Copy(other, from, to, o...))
	}
	return map[string]llb.State{
		"exec":                run(),
		"exec, other args":    base.Run(llb.Args([]string{"cat /base"})).Root(),
		"exec, environment":   run(llb.AddEnv("A", "b")),
		"exec, directory":     run(llb.Dir("/x")),
		"exec, user":          run(llb.User("7")),
		"exec, no network":    run(llb.Network(llb.NetModeNone)),
		"exec, mount":         run(llb.AddMount("/mnt", other)),
		"exec, mount, ro":     run(llb.AddMount("/mnt", other, llb.Readonly)),
		"exec, cache":         run(llb.AddMount("/mnt", llb.Scratch(), llb.AsPersistentCacheDir("id", llb.CacheMountShared))),
		"exec, other cache":   run(llb.AddMount("/mnt", llb.Scratch(), llb.AsPersistentCacheDir("id2", llb.CacheMountShared))),
		"exec, tmpfs":         run(llb.AddMount("/mnt", llb.Scratch(), llb.Tmpfs())),
		"exec, secret":        run(llb.AddSecret("/s", llb.SecretID("a"))),
		"exec, host":          run(llb.AddExtraHost("name", []byte{127, 0, 0, 1})),
		"mkfile":              base.File(file("/f", "1")),
		"mkfile, contents":    base.File(file("/f", "2")),
		"mkfile, name":        base.File(file("/g", "1")),
		"mkfile, mode":        base.File(llb.Mkfile("/f", 0o600, []byte("1"), llb.WithCreatedTime(made))),
		"mkfile, owner":       base.File(llb.Mkfile("/f", 0o644, []byte("1"), llb.WithCreatedTime(made), llb.WithUser("7"))),
		"mkdir":               base.File(dir("/f")),
		"rm":                  base.File(llb.Rm("/f")),
		"rm, if there":        base.File(llb.Rm("/f", llb.WithAllowNotFound(true))),
		"symlink":             base.File(llb.Symlink("/f", "/g")),
		"copy":                copied("/other", "/here"),
		"copy, from":          copied("/other2", "/here"),
		"copy, to":            copied("/other", "/there"),
		"copy, exclude":       copied("/other", "/here", &llb.CopyInfo{ExcludePatterns: []string{"*.o"}}),
		"copy, what is in it": copied("/other", "/here", &llb.CopyInfo{CopyDirContentsOnly: true}),
		"merge":               llb.Merge([]llb.State{base, other}),
		"merge, other order":  llb.Merge([]llb.State{other, base}),
		"diff":                llb.Diff(base, other),
		"diff, other order":   llb.Diff(other, base),
		"diff, to nothing":    llb.Diff(base, llb.Scratch()),
	}
}

// keyOf is the key of a definition, by definitions alone.
func keyOf(t *testing.T, st llb.State) string {
	t.Helper()
	g := loaded(t, st)
	var key func(edge) string
	key = func(e edge) string {
		v := g.vertices[e.vertex]
		inputs := make([]string, len(v.inputs))
		for i, in := range v.inputs {
			inputs[i] = key(in)
		}
		k, err := definitionKey(v, inputs)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%s/%d", k, e.output)
	}
	return key(g.root)
}

// A key that changes without need costs all users their caches: when this test
// fails, either the change was not meant, or keyVersion has to change with it.
func TestKeysAreStable(t *testing.T) {
	const path = "testdata/keys.txt"
	all := subjects()
	var got strings.Builder
	seen := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		key := keyOf(t, all[name])
		if other := seen[key]; other != "" {
			t.Errorf("%q and %q have the same key", name, other)
		}
		seen[key] = name
		fmt.Fprintf(&got, "%s %s\n", key, name)
	}
	if *update {
		if err := os.WriteFile(path, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("keys are not those of %s (%s); go test ./builder -update\n%s", path, keyVersion, got.String())
	}
}

// What cannot change a result is in no key.
func TestKeysLeaveOutWhatDoesNotMatter(t *testing.T) {
	base := llb.Scratch().File(file("/base", "base"))
	plain := base.Run(llb.Args([]string{"true"})).Root()
	for name, same := range map[string]llb.State{
		"a name for people":   base.Run(llb.Args([]string{"true"}), llb.WithCustomName("a name")).Root(),
		"a progress group":    base.Run(llb.Args([]string{"true"}), llb.ProgressGroup("id", "name", false)).Root(),
		"a proxy":             base.Run(llb.Args([]string{"true"}), llb.WithProxy(llb.ProxyEnv{HTTPProxy: "http://proxy"})).Root(),
		"not to be looked up": base.Run(llb.Args([]string{"true"}), llb.IgnoreCache).Root(),
	} {
		if keyOf(t, same) != keyOf(t, plain) {
			t.Errorf("%s changes the key", name)
		}
	}
}

// Parts of a key do not run into one another.
func TestKeyPartsAreApart(t *testing.T) {
	seen := map[string][]string{}
	for _, parts := range [][]string{{}, {""}, {"", ""}, {"ab"}, {"a", "b"}, {"", "ab"}, {"ab", ""}, {"a\x00b"}, {"a", "\x00b"}} {
		k := newKeyHash("test")
		k.add(parts...)
		if other, ok := seen[k.sum()]; ok {
			t.Errorf("%q and %q have the same hash", parts, other)
		}
		seen[k.sum()] = parts
	}
	if newKeyHash("a").sum() == newKeyHash("b").sum() {
		t.Error("keys of two kinds are the same")
	}
}

// A tree's digest is about what shows, however many layers it stands in, and
// about all of it but times.
func TestTreeDigest(t *testing.T) {
	b := newBuilder(t)
	for seed := range uint64(30) {
		j := begun(t, b)
		pen := newScribbler(seed)
		st := pen.change(scratch(dir("/base"), file("/base/f", "f")), 4)
		key := solved(t, j, st)
		stacked, err := j.digestOf(t.Context(), key, everything)
		if err != nil {
			t.Fatal(err)
		}
		whole := shown(t, b, key)
		if one := digestOfAll(t, whole); one != stacked {
			t.Errorf("seed %d: the digest of the layers is not that of what they show", seed)
		}
		for i := range whole.Entries {
			if whole.Entries[i].Names[0] == "." {
				continue
			}
			pick := rand.New(rand.NewPCG(seed, uint64(i)))
			old := whole.Entries[i]
			e := &whole.Entries[i]
			e.MTime++
			if digestOfAll(t, whole) != stacked {
				t.Errorf("seed %d: a time changes the digest", seed)
			}
			change := []func(){
				func() { e.Mode ^= 0o100 }, func() { e.UID++ }, func() { e.GID++ }, func() { e.SHA256 += "0" },
				func() { e.Target += "x" }, func() { e.Xattrs = map[string]string{"user.x": "y"} }, func() { e.Rdev++ },
				func() { e.Names = []string{e.Names[0] + "~"} },
			}
			n := pick.IntN(len(change))
			change[n]()
			if digestOfAll(t, whole) == stacked {
				t.Errorf("seed %d, %s: change %d leaves the digest as it was", seed, old.Names[0], n)
			}
			whole.Entries[i] = old
		}
	}
}

func digestOfAll(t *testing.T, m *layer.Manifest) string {
	t.Helper()
	d, err := newTreeView([]layer.Parent{{Manifest: m}}).digest(everything)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
