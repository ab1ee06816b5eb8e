package corpustest

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// result tells what is in an output: an OCI archive, an archive of files, or a
// folder.
func (w *world) result(dest string) (string, error) {
	fi, err := os.Stat(dest)
	if err != nil {
		return "", err
	}
	var data []byte
	if fi.IsDir() {
		var buf bytes.Buffer
		if err := packFolder(&buf, dest); err != nil {
			return "", err
		}
		data = buf.Bytes()
	} else if data, err = os.ReadFile(dest); err != nil {
		return "", err
	}
	if files, err := filesOf(data); err != nil {
		return "", err
	} else if files[ocispec.ImageLayoutFile] != nil {
		return w.layout(files)
	}
	t := tree{}
	err = t.apply(data)
	return t.list(tree{}), err
}

func packFolder(to io.Writer, dir string) error {
	tw := tar.NewWriter(to)
	if err := tw.AddFS(os.DirFS(dir)); err != nil {
		return err
	}
	return tw.Close()
}

func filesOf(archive []byte) (map[string][]byte, error) {
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, nil
		}
		if err == nil && h.Typeflag == tar.TypeReg {
			files[h.Name], err = io.ReadAll(r)
		}
		if err != nil {
			return nil, err
		}
	}
}

// layout tells what images are in an OCI layout.
func (w *world) layout(files map[string][]byte) (string, error) {
	var out strings.Builder
	var index ocispec.Index
	if err := json.Unmarshal(files[ocispec.ImageIndexFile], &index); err != nil {
		return "", err
	}
	for _, d := range index.Manifests {
		if err := w.descriptor(&out, files, d); err != nil {
			return "", err
		}
	}
	return out.String(), nil
}

func blob(files map[string][]byte, d ocispec.Descriptor) []byte {
	return files[ocispec.ImageBlobsDir+"/"+d.Digest.Algorithm().String()+"/"+d.Digest.Encoded()]
}

func (w *world) descriptor(out *strings.Builder, files map[string][]byte, d ocispec.Descriptor) error {
	fmt.Fprint(out, "# ", d.MediaType)
	if d.Platform != nil {
		fmt.Fprintf(out, " %s/%s", d.Platform.OS, d.Platform.Architecture+strings.TrimSuffix("/"+d.Platform.Variant, "/"))
	}
	fmt.Fprintln(out)
	annotations(out, "of the descriptor", d.Annotations)
	if d.MediaType == ocispec.MediaTypeImageIndex {
		var index ocispec.Index
		if err := json.Unmarshal(blob(files, d), &index); err != nil {
			return err
		}
		annotations(out, "of the index", index.Annotations)
		for _, child := range index.Manifests {
			if err := w.descriptor(out, files, child); err != nil {
				return err
			}
		}
		return nil
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(blob(files, d), &m); err != nil {
		return err
	}
	annotations(out, "of the manifest", m.Annotations)
	return w.image(out, files, m)
}

func (w *world) image(out *strings.Builder, files map[string][]byte, m ocispec.Manifest) error {
	var config map[string]any
	if err := json.Unmarshal(blob(files, m.Config), &config); err != nil {
		return err
	}
	var typed ocispec.Image
	if err := json.Unmarshal(blob(files, m.Config), &typed); err != nil {
		return err
	}
	base, t := tree{}, tree{}
	if ids := typed.RootFS.DiffIDs; len(ids) > 0 && ids[0].String() == w.diffID {
		base, t = w.tree, maps.Clone(w.tree)
		m.Layers = m.Layers[1:]
	}
	for _, l := range m.Layers {
		fmt.Fprintln(out, "# +", l.MediaType)
		if err := t.apply(blob(files, l)); err != nil {
			return fmt.Errorf("layer %s: %w", l.Digest, err)
		}
	}
	out.WriteString(t.list(base))
	rootfs, _ := config["rootfs"].(map[string]any)
	diffs, _ := rootfs["diff_ids"].([]any)
	rootfs["diff_ids"] = len(diffs)
	dropTimes(config)
	history, _ := config["history"].([]any)
	for _, e := range history {
		dropTimes(e.(map[string]any))
	}
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(config); err != nil {
		return err
	}
	out.Write(text.Bytes())
	return nil
}

func dropTimes(object map[string]any) {
	s, _ := object["created"].(string)
	if at, err := time.Parse(time.RFC3339, s); err == nil && undecided(at) {
		delete(object, "created")
	}
}

func annotations(out *strings.Builder, where string, all map[string]string) {
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if key == ocispec.AnnotationCreated { // a time of its own, whatever was asked for
			continue
		}
		fmt.Fprintf(out, "annotation %s: %s=%q\n", where, key, all[key])
	}
}

func dest(t *testing.T) string { return filepath.Join(t.TempDir(), "out") }
