package crashtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/staticfs"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"

	"varve.dev/daemon"
	"varve.dev/layout"
)

// TestKillInABuild kills the daemon, at a random moment, while a client of
// BuildKit's builds forty steps in it. In the next daemon the same build carries
// out none of the steps that the client was told are over, the image has the
// files of one that nothing interrupted, and nothing is left behind.
func TestKillInABuild(t *testing.T) {
	cases := caseCount(t, 20) / 10
	s := newSupplies(t)
	m := newMachine(t, s, 0, map[string]time.Duration{})
	m.begin(t)
	files := filepath.Join(m.dir, "long")
	must(t, longContext(files))
	c := &cutBuilds{by: "kill -9 of the daemon", steps: fmt.Sprintf("%d steps in %d stages, by BuildKit's client", longSteps, longStages), cuts: cases}
	for i := range cases {
		m.cutBuild(t, c, files, fmt.Sprintf("seed%d-case%d", seed(t), i))
	}
	if c.hits() < wantedHits {
		t.Errorf("%.1f %% of the steps were known after a kill", c.hits())
	}
	tell(t, cutBuildTable, c)
}

// cutBuild is one case.
func (m *machine) cutBuild(t *testing.T, c *cutBuilds, files, nonce string) {
	t.Helper()
	b := &longClient{machine: m, files: files, dockerfile: longBuild(m.supplies.small(), nonce)}
	d, err := m.startDaemon()
	must(t, err)
	defer m.kill(d)
	after, wait := m.random.IntN(longSteps), time.Duration(m.random.Int64N(int64(200*time.Millisecond)))
	var cut steps
	begun := make(chan struct{}, longSteps)
	cut.each = func(string, bool) { begun <- struct{}{} }
	ended := make(chan error, 1)
	go func() { ended <- b.build(&cut, "", nil) }()
	for range after {
		select {
		case <-begun:
		case err := <-ended:
			t.Fatalf("%s ended before it was cut: %v: %s", nonce, err, d.printed(aPage))
		}
	}
	time.Sleep(wait)
	m.kill(d)
	if err := <-ended; err == nil {
		t.Logf("%s, killed %v after step %d, was over", nonce, wait, after)
	}
	wrong := m.buildAgain(t, c, b, cut.finished())
	m.told.images[m.builtName(0)] = []string{anyOf}
	h := happened{orderly: true, wrong: wrong}
	if len(wrong) > 0 {
		c.bad++
	}
	m.verdict(t, fmt.Sprintf("%s, killed %v after step %d", nonce, wait, after), h, layout.Deep)
}

// buildAgain makes the build again in a new daemon, and then without the cache,
// and compares.
func (m *machine) buildAgain(t *testing.T, c *cutBuilds, b *longClient, before []string) (wrong []string) {
	t.Helper()
	d, err := m.startDaemon()
	must(t, err)
	defer m.kill(d)
	var again, anew steps
	cached, fresh := t.TempDir(), t.TempDir()
	must(t, b.build(&again, cached, nil))
	must(t, b.build(&anew, fresh, map[string]string{"no-cache": ""}))
	must(t, d.endDaemon())
	lost := again.ranAgain(before)
	c.before, c.again = c.before+len(before), c.again+len(lost)
	for _, name := range lost {
		t.Logf("told to be over, and carried out again: %s", name)
	}
	if n := len(anew.ranAgain(anew.finished())); n != longSteps {
		wrong = append(wrong, fmt.Sprintf("without the cache %d steps ran, and should be %d", n, longSteps))
	}
	want, got := plainTree(t, fresh), plainTree(t, cached)
	if !reflect.DeepEqual(got, want) {
		wrong = append(wrong, fmt.Sprintf("the image has %d files, and not the %d of a build that was not cut", len(got), len(want)))
	}
	return wrong
}

// longClient makes a long build in the machine's daemon, as buildctl does.
type longClient struct {
	*machine
	files, dockerfile string
}

// build builds an image; to, if it is not empty, gets its files.
func (b *longClient) build(s *steps, to string, attrs map[string]string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := client.New(ctx, "unix://"+filepath.Join(b.state, daemon.DaemonSocket))
	if err != nil {
		return err
	}
	defer c.Close()
	// A daemon that is killed while it starts a process leaves its socket to
	// that one until it executes its program: somebody takes calls, and drops them.
	if err := c.Wait(ctx); err != nil {
		return err
	}
	files, err := fsutil.NewFS(b.files)
	if err != nil {
		return err
	}
	text := staticfs.NewFS()
	text.Add("Dockerfile", &fstypes.Stat{Mode: 0o644}, []byte(b.dockerfile))
	exports := []client.ExportEntry{{Type: client.ExporterImage, Attrs: map[string]string{"name": b.builtName(0)}}}
	if to != "" {
		exports = append(exports, client.ExportEntry{Type: client.ExporterLocal, OutputDir: to})
	}
	status := make(chan *client.SolveStatus)
	told := make(chan struct{})
	go func() {
		defer close(told)
		for st := range status {
			s.tell(st)
		}
	}()
	_, err = c.Solve(ctx, nil, client.SolveOpt{
		Frontend: "dockerfile.v0", FrontendAttrs: attrs, Exports: exports,
		LocalMounts: map[string]fsutil.FS{"context": files, "dockerfile": text},
	}, status)
	<-told
	return err
}

// plainTree is what a build made, without the times.
func plainTree(t *testing.T, dir string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		var data []byte
		if fi.Mode().IsRegular() {
			data, err = os.ReadFile(path)
		} else if fi.Mode()&fs.ModeSymlink != 0 {
			var target string
			target, err = os.Readlink(path)
			data = []byte(target)
		}
		st := fi.Sys().(*syscall.Stat_t)
		tree[strings.TrimPrefix(path, dir)] = fmt.Sprintf("%v %d:%d %q", fi.Mode(), st.Uid, st.Gid, data)
		return err
	}))
	if len(tree) == 0 {
		t.Fatal(errors.New("there are no files"))
	}
	return tree
}
