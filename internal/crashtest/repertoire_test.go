package crashtest

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/internal/testkit"
)

// clients is how many commands work on one store at once, at most. Each has
// names of its own, for the ledger's sake; the blobs and layers behind them
// are shared.
const clients = 3

// order is a command to be run, and what is true when it succeeds.
type order struct {
	kind   string
	args   []string
	again  bool              // the command does it again when its host is killed
	images map[string]string // names that it changes
	// container is the name of the one that it makes; stays tells whether it
	// is there when the command ends.
	container string
	stays     bool
	done      func() error // looks at what is outside the store; may be nil
}

func (o order) String() string { return "varve " + strings.Join(o.args, " ") }

// built is what a client has built last.
type built struct{ nonce, change string }

// supplies are what the commands work with, the same for all machines.
type supplies struct {
	place
	digests  map[string]string // of the images in the registry, by name
	archives [clients]string   // each with an image loaded-<client>:1
	loaded   [clients]string   // its digest
	context  string
	gap      gap
}

func newSupplies(t *testing.T) *supplies {
	t.Helper()
	testkit.NeedRoot(t)
	registry := testkit.Registry(t)
	s := &supplies{place: place{remote: registry.Addr, registry: registry}, digests: map[string]string{}, context: t.TempDir()}
	put := func(img testkit.Image, name string) {
		s.digests[registry.Push(t, img, name)] = img.Target.Digest.String()
	}
	put(testkit.Busybox(t), smallName)
	stacked, low := testkit.Stacked(t, 6, 30), testkit.Stacked(t, 3, 15)
	for c := range clients {
		put(stacked, fmt.Sprintf("stacked-%d:1", c))
		put(low, fmt.Sprintf("low-%d:1", c))
		// One archive has an image that is pulled too.
		img := stacked
		if c > 0 {
			img = testkit.Stacked(t, 4, 20)
		}
		s.archives[c] = filepath.Join(t.TempDir(), "archive.tar")
		s.loaded[c] = img.Target.Digest.String()
		must(t, archive(img.Dir, s.archives[c], named(img.Target, fmt.Sprintf("loaded-%d:1", c))))
	}
	must(t, errors.Join(
		os.WriteFile(filepath.Join(s.context, "Dockerfile"), []byte(s.dockerfile()), 0o644),
		os.WriteFile(filepath.Join(s.context, "some"), plainContents(1), 0o644),
	))
	return s
}

// dockerfile has two stages, a cache mount that begins with what NONCE made,
// and a last step that CHANGE alone makes another.
func (s *supplies) dockerfile() string {
	from := "FROM " + s.small()
	return from + ` AS files
ARG NONCE
COPY some /files/some
RUN echo $NONCE > /files/nonce
` + from + `
COPY --from=files /files /files
RUN --mount=type=cache,from=files,source=/files,target=/cache cat /cache/nonce > /cached && echo here >> /cache/log
ARG CHANGE
RUN echo $CHANGE > /change
`
}

// small is the image that builds and containers stand on. It is there from the
// second case on, and stays.
func (s *supplies) small() string { return s.remote + "/" + smallName }

// named is an image of an archive, with its name.
func named(img ocispec.Descriptor, name string) ocispec.Descriptor {
	img.Annotations = map[string]string{"io.containerd.image.name": "docker.io/library/" + name}
	return img
}

// archive writes images of a layout into a tar file.
func archive(layout, file string, images ...ocispec.Descriptor) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	index, err := json.Marshal(ocispec.Index{Manifests: images})
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	add := func(name string, data []byte) error {
		err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(data)), Mode: 0o644})
		if err == nil {
			_, err = w.Write(data)
		}
		return err
	}
	blobs, err := os.ReadDir(filepath.Join(layout, "blobs", "sha256"))
	for _, b := range blobs {
		var data []byte
		if err == nil {
			data, err = os.ReadFile(filepath.Join(layout, "blobs", "sha256", b.Name()))
		}
		if err == nil {
			err = add("blobs/sha256/"+b.Name(), data)
		}
	}
	return errors.Join(err, add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)), add("index.json", index), w.Close())
}

// act is a kind of command: what a client would run of it now, if anything.
type act struct {
	kind string
	plan func(m *machine, client int) (order, bool)
}

// repertoire is every kind of command, in an order in which each finds what
// it needs.
func repertoire() []act {
	return []act{
		{"pull", (*machine).pull},
		{"pull again", (*machine).pullAgain},
		{"build fresh", (*machine).buildFresh},
		{"build cached", (*machine).buildCached},
		{"build changed", (*machine).buildChanged},
		{"push", (*machine).push},
		{"save", (*machine).save},
		{"load", (*machine).load},
		{"tag", (*machine).tag},
		{"rmi", (*machine).rmi},
		{"run", (*machine).runAndKeep},
		{"run --rm", (*machine).runAndRemove},
		{"commit", (*machine).commit},
		{"fsck --repair", look("fsck", "--repair")},
		{"fsck", look("fsck")},
		{"images", look("images")},
		{"info", look("info")},
		{"inspect", lookAt("inspect")},
		{"history", lookAt("history")},
	}
}

// pulled, tagged and so on are a client's names.
func (m *machine) pulled(c int) []string {
	return []string{fmt.Sprintf("%s/stacked-%d:1", m.remote, c), fmt.Sprintf("%s/low-%d:1", m.remote, c)}
}
func (m *machine) tagged(c int) []string {
	return []string{fmt.Sprintf("kept-%d:1", c), fmt.Sprintf("kept-%d:2", c)}
}
func (m *machine) builtName(c int) string {
	return fmt.Sprintf("%s/built-%d-%d:1", m.remote, m.lane, c)
}
func (m *machine) loadedName(c int) string { return fmt.Sprintf("loaded-%d:1", c) }
func (m *machine) commitName(c int) string { return fmt.Sprintf("committed-%d:1", c) }

// own are all the names of a client that are images now.
func (m *machine) own(c int) []string {
	return m.told.present(append(append(m.pulled(c), m.tagged(c)...), m.builtName(c), m.loadedName(c), m.commitName(c)))
}

// one chooses from a list.
func (m *machine) one(list []string) (string, bool) {
	if len(list) == 0 {
		return "", false
	}
	return list[m.random.IntN(len(list))], true
}

func (m *machine) pullOf(name string) order {
	return order{args: []string{"pull", "-q", name}, again: true, images: map[string]string{name: m.supplies.digests[name]}}
}

func (m *machine) pull(c int) (order, bool) {
	var absent []string
	for _, n := range m.pulled(c) {
		if m.told.is(n) == gone {
			absent = append(absent, n)
		}
	}
	name, ok := m.one(absent)
	return m.pullOf(name), ok
}

func (m *machine) pullAgain(c int) (order, bool) {
	name, ok := m.one(m.told.present(m.pulled(c)))
	return m.pullOf(name), ok
}

func (m *machine) build(c int, b built) (order, bool) {
	m.builds[c] = b
	return order{
		args: []string{"build", "-q", "-t", m.builtName(c), "--build-arg", "NONCE=" + b.nonce, "--build-arg", "CHANGE=" + b.change, m.supplies.context},
		// What it stands for is known when it is there.
		again: true, images: map[string]string{m.builtName(c): anyOf},
	}, m.hasSmall()
}

func (m *machine) hasSmall() bool { return m.told.is(m.supplies.small()) != gone }

func (m *machine) fresh() string { return fmt.Sprint(m.random.Uint64()) }

func (m *machine) buildFresh(c int) (order, bool) {
	return m.build(c, built{m.fresh(), m.fresh()})
}

func (m *machine) buildCached(c int) (order, bool) {
	o, ok := m.build(c, m.builds[c])
	return o, ok && m.builds[c].nonce != ""
}

func (m *machine) buildChanged(c int) (order, bool) {
	o, ok := m.build(c, built{m.builds[c].nonce, m.fresh()})
	return o, ok && m.builds[c].nonce != ""
}

func (m *machine) push(c int) (order, bool) {
	name, ok := m.one(m.told.present(append(m.pulled(c), m.builtName(c))))
	want := m.told.is(name)
	return order{args: []string{"push", "-q", name}, again: true, done: func() error {
		repo, _ := strings.CutPrefix(strings.TrimSuffix(name, ":1"), m.remote+"/")
		req, err := http.NewRequest(http.MethodHead, "http://"+m.remote+"/v2/"+repo+"/manifests/1", nil)
		if err != nil {
			return err
		}
		req.Header.Set("Accept", ocispec.MediaTypeImageManifest+", "+ocispec.MediaTypeImageIndex)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if got := resp.Header.Get("Docker-Content-Digest"); got != want {
			return fmt.Errorf("the registry has %s (%s), pushed was %s", got, resp.Status, want)
		}
		return nil
	}}, ok
}

func (m *machine) save(c int) (order, bool) {
	name, ok := m.one(m.own(c))
	file, want := filepath.Join(m.dir, fmt.Sprintf("saved-%d.tar", c)), m.told.is(name)
	return order{args: []string{"save", "-o", file, name}, done: func() error {
		defer os.Remove(file)
		got, err := archived(file)
		if err == nil && got != want {
			err = fmt.Errorf("the archive has %s, saved was %s", got, want)
		}
		return err
	}}, ok
}

// archived is the digest of the one image in an archive.
func archived(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err != nil {
			return "", fmt.Errorf("an archive without index.json: %w", err)
		}
		if h.Name != ocispec.ImageIndexFile {
			continue
		}
		var index ocispec.Index
		data, err := io.ReadAll(r)
		if err == nil {
			err = json.Unmarshal(data, &index)
		}
		if err != nil || len(index.Manifests) != 1 {
			return "", fmt.Errorf("index.json: %d manifests, %w", len(index.Manifests), err)
		}
		// The rest has to be there too.
		if _, err := io.Copy(io.Discard, f); err != nil {
			return "", err
		}
		return index.Manifests[0].Digest.String(), nil
	}
}

func (m *machine) load(c int) (order, bool) {
	return order{
		args:   []string{"load", "-q", "-i", m.supplies.archives[c]},
		images: map[string]string{m.loadedName(c): m.supplies.loaded[c]},
	}, true
}

func (m *machine) tag(c int) (order, bool) {
	source, ok := m.one(m.own(c))
	target, _ := m.one(m.tagged(c))
	return order{args: []string{"tag", source, target}, again: true, images: map[string]string{target: m.told.is(source)}}, ok
}

func (m *machine) rmi(c int) (order, bool) {
	name, ok := m.one(m.own(c))
	return order{args: []string{"rmi", name}, images: map[string]string{name: gone}}, ok
}

func (m *machine) container(stays bool) (order, bool) {
	m.names++
	name := fmt.Sprintf("container-%d", m.names)
	args := []string{"run", "--name", name, "-e", "NAME=" + name, m.supplies.small(), "sh", "-c", "echo $NAME > /made"}
	if !stays {
		args = append([]string{"run", "--rm"}, args[1:]...)
	}
	return order{args: args, container: name, stays: stays}, m.hasSmall()
}

func (m *machine) runAndKeep(int) (order, bool)   { return m.container(true) }
func (m *machine) runAndRemove(int) (order, bool) { return m.container(false) }

// commit makes an image of a container that has run.
func (m *machine) commit(c int) (order, bool) {
	var list []string
	for name, is := range m.told.containers {
		if slices.Equal(is, []string{ran}) {
			list = append(list, name)
		}
	}
	slices.Sort(list)
	name, ok := m.one(list)
	return order{args: []string{"commit", name, m.commitName(c)}, images: map[string]string{m.commitName(c): anyOf}}, ok
}

// look is a command that changes nothing.
func look(args ...string) func(*machine, int) (order, bool) {
	return func(*machine, int) (order, bool) { return order{args: args, again: true}, true }
}

func lookAt(command string) func(*machine, int) (order, bool) {
	return func(m *machine, c int) (order, bool) {
		name, ok := m.one(m.own(c))
		return order{args: []string{command, name}, again: true}, ok
	}
}
