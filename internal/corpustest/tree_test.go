package corpustest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/zstd"

	"varve.dev/internal/testkit"
)

// tree is what a stack of layers shows, by name. Names of one file share a node.
type tree map[string]*node

type node struct{ kind, attrs, what string }

// undecided tells whether a time is that of a build, which no two have in
// common.
func undecided(at time.Time) bool { return at.After(testkit.Epoch) }

// apply puts a layer, a tar stream that may be compressed, on a tree. It shares
// no code with what unpacks layers for varve.
func (t tree) apply(layer []byte) error {
	stream, err := expanded(layer)
	if err != nil {
		return err
	}
	added := tree{}
	for r := tar.NewReader(stream); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		dir, base := path.Split(name)
		switch gone, isWhiteout := strings.CutPrefix(base, ".wh."); {
		case base == ".wh..wh..opq":
			t.remove(strings.TrimSuffix(dir, "/"), false)
			continue
		case isWhiteout:
			t.remove(dir+gone, true)
			continue
		case h.Typeflag == tar.TypeLink:
			to := strings.TrimPrefix(path.Clean("/"+h.Linkname), "/")
			if added[name] = added[to]; added[name] == nil {
				added[name] = t[to]
			}
			if added[name] == nil {
				return fmt.Errorf("%s is a link to %s, which is not there", name, to)
			}
			continue
		}
		if added[name], err = describe(h, r); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(added)) {
		if added[name].kind != "dir" {
			t.remove(name, true)
		}
		t[name] = added[name]
	}
	return nil
}

// remove takes what is below a name away, and the name.
func (t tree) remove(name string, itself bool) {
	for n := range t {
		if n == name && itself || strings.HasPrefix(n, name+"/") || name == "" && n != "" {
			delete(t, n)
		}
	}
}

func expanded(data []byte) (io.Reader, error) {
	switch {
	case bytes.HasPrefix(data, []byte{0x1f, 0x8b}):
		return gzip.NewReader(bytes.NewReader(data))
	case bytes.HasPrefix(data, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return zstd.NewReader(bytes.NewReader(data))
	}
	return bytes.NewReader(data), nil
}

var kinds = map[byte]string{tar.TypeReg: "file", tar.TypeDir: "dir", tar.TypeSymlink: "link", tar.TypeFifo: "fifo", tar.TypeChar: "char", tar.TypeBlock: "block"}

// describe is everything that a layer can say of a file.
func describe(h *tar.Header, r io.Reader) (*node, error) {
	n := &node{kind: kinds[h.Typeflag]}
	if n.kind == "" {
		return nil, fmt.Errorf("%s is of kind %q", h.Name, h.Typeflag)
	}
	n.attrs = fmt.Sprintf("%o %d:%d", h.Mode&0o7777, h.Uid, h.Gid)
	// BuildKit gives a folder of a context its time, or does not: twice the same
	// build differs.
	if !undecided(h.ModTime) && !(n.kind == "dir" && h.ModTime.Equal(then)) {
		n.attrs += h.ModTime.UTC().Format(" 2006-01-02T15:04:05.999999999Z")
	}
	for _, key := range slices.Sorted(maps.Keys(h.PAXRecords)) {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			n.attrs += fmt.Sprintf(" %s=%q", name, h.PAXRecords[key])
		}
	}
	switch n.kind {
	case "file":
		data, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		n.what = contents(data)
	case "link":
		n.what = fmt.Sprintf("to %q", h.Linkname)
	case "char", "block":
		n.what = fmt.Sprintf("%d:%d", h.Devmajor, h.Devminor)
	}
	return n, nil
}

// contents are told in full where they can be read.
func contents(data []byte) string {
	if len(data) <= 400 && utf8.Valid(data) {
		return fmt.Sprintf("%q", data)
	}
	return fmt.Sprintf("%d bytes, sha256 %x", len(data), sha256.Sum256(data))
}

// list tells what is in a tree and not in the one that it was built on, and what
// is not in it any more.
func (t tree) list(base tree) string {
	var out strings.Builder
	first := map[*node]string{}
	all := tree{}
	maps.Copy(all, t)
	maps.Copy(all, base)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		n, was := t[name], base[name]
		switch {
		case n == nil:
			if parent := t[path.Dir(name)]; parent != nil || path.Dir(name) == "." {
				fmt.Fprintf(&out, "%q is gone\n", name)
			}
		case was != nil && *n == *was:
		case first[n] != "":
			fmt.Fprintf(&out, "%q is %q\n", name, first[n])
		default:
			first[n] = name
			fmt.Fprintln(&out, strings.TrimSuffix(fmt.Sprintf("%q %s %s %s", name, n.kind, n.attrs, n.what), " "))
		}
	}
	return out.String()
}

func baseTree(t *testing.T, image testkit.Image) (tree, string) {
	t.Helper()
	manifest, config := testkit.ReadImage(t, image)
	out := tree{}
	for _, l := range manifest.Layers {
		if err := out.apply(readFile(t, testkit.BlobPath(image.Dir, l.Digest))); err != nil {
			t.Fatal(err)
		}
	}
	return out, config.RootFS.DiffIDs[0].String()
}
