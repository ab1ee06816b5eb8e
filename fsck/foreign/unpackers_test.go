package foreign

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ctr "github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
	"varve.dev/internal/testkit"
	"varve.dev/overlay"
)

// held compares a tree with the stream that it was unpacked from.
func held(t *testing.T, tree string, stream []byte, below stack) []Finding {
	t.Helper()
	want, err := expect(bytes.NewReader(stream), true)
	if err != nil {
		return []Finding{{Kind: Unchecked, Detail: err.Error()}}
	}
	root, err := reach.Dir(unix.AT_FDCWD, tree)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	c := &checker{ctx: t.Context(), opts: Options{Limit: 1000}, report: &Report{Counts: map[Kind]int64{}}}
	o := &object{c: c, name: "layer", source: "its blob", images: []string{"image"}}
	s := &ctrStore{checker: c}
	(&comparison{object: o, rest: "its blob", below: below, contents: s.hashFile}).run(root, want)
	return c.report.Findings
}

func report(t *testing.T, what string, findings []Finding) {
	t.Helper()
	for _, f := range findings {
		t.Errorf("%s: %s %s %s: %s", what, f.Severity, f.Kind, f.File, f.Detail)
	}
}

// streamsOf are an image's layers.
func streamsOf(t testing.TB, img testkit.Image) (out [][]byte) {
	t.Helper()
	m, _ := testkit.ReadImage(t, img)
	for _, l := range m.Layers {
		f, err := os.Open(testkit.BlobPath(img.Dir, l.Digest))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		z, err := compression.DecompressStream(f)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, data)
	}
	return out
}

// unpackers are the ways in which engines unpack a layer over others: into the
// mounted stack (dockerd on kernels with redirect_dir), and beside it.
var unpackers = map[string]func(t *testing.T, upper string, below []string, stream []byte) error{
	"mounted": func(t *testing.T, upper string, below []string, stream []byte) error {
		at := filepath.Join(t.TempDir(), "merged")
		if err := os.Mkdir(at, 0o755); err != nil {
			return err
		}
		if err := overlay.Mount(overlay.Tree{Lowers: below, Upper: upper, Work: upper + ".work"}, at); err != nil {
			return err
		}
		defer func() {
			if err := unix.Unmount(at, 0); err != nil {
				t.Error(err)
			}
		}()
		_, err := ctr.Apply(t.Context(), at, bytes.NewReader(stream))
		return err
	},
	"beside": func(t *testing.T, upper string, below []string, stream []byte) error {
		_, err := ctr.Apply(t.Context(), upper, bytes.NewReader(stream),
			ctr.WithConvertWhiteout(ctr.OverlayConvertWhiteout), ctr.WithParents(below))
		return err
	},
}

// Whichever way an engine unpacks, what it unpacked is as it must be.
func TestUnpackersAreRight(t *testing.T) {
	testkit.NeedRoot(t)
	// The second can do what the engines can.
	images := map[string][]testkit.Image{
		"mounted": {testkit.Awkward(t), testkit.Stacked(t, 4, 20)},
		"beside":  {testkit.AwkwardWithout(t, "", "hardlinks into lower layers", "implied directories")},
	}
	for name, unpack := range unpackers {
		for _, img := range images[name] {
			dir := t.TempDir()
			var below []string
			for i, stream := range streamsOf(t, img) {
				upper := filepath.Join(dir, fmt.Sprint(i))
				if err := os.Mkdir(upper, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := unpack(t, upper, below, stream); err != nil {
					t.Fatalf("%s, layer %d: %v", name, i, err)
				}
				report(t, fmt.Sprintf("%s, %s, layer %d", name, img.Name, i), held(t, upper, stream, below))
				below = append([]string{upper}, below...)
			}
		}
	}
}

// script makes a layer of bytes: two for each entry, what it is and where. A
// tame one has nothing that an unpacker into a mounted stack is known to get
// wrong: it follows links of lower layers, and takes away what stands before
// the mark of an opaque directory in a directory that nothing lists.
func script(bytes []byte, tame bool) ([]byte, error) {
	names := []string{"a", "a/b", "a/b/c", "a/b/c/d", "l", "l/x", "l/x/y", "../a", "/a//b/./e", "a/.wh.b", ".wh.a", "a/.wh..wh..opq", "l/.wh.x", ".wh..wh..opq", "a/b/.wh.c", "z"}
	targets := []string{"a", "a/b", "/a/b/c", "..", "../../l", "l/x", "z", "."}
	return testkit.Tar(func(b *testkit.LayerBuilder) {
		for i := 0; i+1 < len(bytes) && i < 64; i += 2 {
			what, name := bytes[i], names[bytes[i+1]%16]
			if tame && (what%8 == 4 || strings.HasSuffix(name, opaqueName) && i > 0) {
				continue
			}
			more := testkit.Owner(int(bytes[i+1]>>4), 0)
			switch what % 8 {
			case 0, 1:
				b.Dir(name, 0o700+int64(what>>3), more)
			case 2, 3:
				b.File(name, 0o600+int64(what>>3), []byte(name)[:what>>5], more)
			case 4:
				b.Symlink(name, targets[what>>5], more)
			case 5:
				b.Hardlink(name, targets[what>>5], more)
			case 6:
				b.Node(tar.TypeFifo, name, 0o600, 0, 0, more)
			case 7:
				b.Text(name, "", testkit.Xattr("user.x", string(what)), more)
			}
		}
	})
}

// FuzzUnpacked: what containerd unpacks of any layer, on any other and either
// way, is what is expected of it.
func FuzzUnpacked(f *testing.F) {
	f.Add([]byte("\x00\x00\x02\x01\x05\x02\x04\x04\x02\x05\x02\x09\x00\x0b"))
	f.Add([]byte("\x02\x01\x25\x04\x00\x01\x02\x02\x44\x00\x02\x01"))
	f.Add([]byte("\x64\x04\x02\x05\x06\x02\x07\x06\x02\x0a\x00\x00\x02\x07"))
	f.Fuzz(func(t *testing.T, bytes []byte) {
		testkit.NeedRoot(t)
		for name, unpack := range unpackers {
			var below []string
			for i, half := range [][]byte{bytes[:len(bytes)/2], bytes[len(bytes)/2:]} {
				stream, err := script(half, name == "mounted")
				tree := filepath.Join(t.TempDir(), "tree")
				if err := errors.Join(err, os.Mkdir(tree, 0o755)); err != nil {
					t.Fatal(err)
				}
				if i == 0 {
					err = unpackers["beside"](t, tree, nil, stream)
				} else {
					err = unpack(t, tree, below, stream)
				}
				if err != nil {
					return // it is refused
				}
				report(t, fmt.Sprintf("%s, layer %d", name, i), held(t, tree, stream, below))
				below = []string{tree}
			}
		}
	})
}

// FuzzTarSplit: no record of dockerd's ends in more than an error.
func FuzzTarSplit(f *testing.F) {
	layer, err := script([]byte("\x00\x00\x42\x01\x84\x04"), false)
	if err != nil {
		f.Fatal(err)
	}
	var record bytes.Buffer
	stream, done, err := asm.NewInputTarStreamWithDone(bytes.NewReader(layer), storage.NewJSONPacker(&record), nil)
	if err != nil {
		f.Fatal(err)
	}
	_, err = io.Copy(io.Discard, stream)
	if err = errors.Join(err, <-done); err != nil {
		f.Fatal(err)
	}
	f.Add(record.Bytes())
	f.Add([]byte(`{"type":1,"name":"../../etc/passwd","size":3,"payload":"AAAAAAAAAAA=","position":0}`))
	f.Fuzz(func(t *testing.T, record []byte) {
		root, err := reach.Dir(unix.AT_FDCWD, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		var packed bytes.Buffer
		z := gzip.NewWriter(&packed)
		if _, err := z.Write(record); err != nil {
			t.Fatal(err)
		}
		z.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second) // sizes are believed
		defer cancel()
		r := &reassembly{c: &checker{ctx: ctx, report: &Report{}}, root: root, wrong: map[string]mismatch{}}
		_, _, _ = r.run(&packed)
		for name, m := range r.wrong {
			if m.kind != Missing {
				t.Errorf("%q in an empty tree is %s", name, m.kind)
			}
		}
	})
}
