package corpustest

import (
	"flag"
	"hash/fnv"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"
)

var update = flag.Bool("update", false, "write what comes out into the cases")

const corpusDir = "../../builder/testdata/corpus"

// then is when the folders and links of a context were changed that say nothing
// else.
var then = time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)

// thenOf is when a file was changed. Another content has another time: what a
// client has sent under a name before it sends again only where size or time
// differ, and here all cases send to one daemon.
func thenOf(content []byte) time.Time {
	h := fnv.New32a()
	h.Write(content)
	return then.Add(time.Duration(h.Sum32()%(365*24*3600)) * time.Second)
}

// testCase is one build of the corpus.
type testCase struct {
	name    string
	file    string // the case itself
	dir     string // where it lies for the clients: the build context
	args    []string
	context string // a URL, or "." for dir
	want    string // what buildkitd makes of it
	varve   string // what varve does, where that is another thing
	world   *world
}

// caseNames are those of the corpus.
func caseNames(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(corpusDir, "*.txtar"))
	if err != nil || len(files) < 80 {
		t.Fatalf("%d cases in %s: %v", len(files), corpusDir, err)
	}
	for _, f := range files {
		names = append(names, strings.TrimSuffix(filepath.Base(f), ".txtar"))
	}
	return names
}

// lay reads a case and lays it out below the world's folder.
func (w *world) lay(t *testing.T, name string) *testCase {
	t.Helper()
	c := &testCase{name: name, file: filepath.Join(corpusDir, name+".txtar"), dir: filepath.Join(w.dir, name), context: ".", world: w}
	a, err := txtar.ParseFile(c.file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(c.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var setup, xattrs string
	said := map[string][]byte{} // before anything is filled in, which is new each time
	for _, f := range a.Files {
		text := string(f.Data)
		switch f.Name {
		case "args":
			c.readArgs(c.fill(text))
		case "xattrs":
			xattrs = text
		case "setup":
			setup = c.fill(text)
		case "want":
			c.want = text
		case "varve":
			c.varve = text
		default:
			write(t, filepath.Join(c.dir, f.Name), c.fill(text))
			said[filepath.Join(c.dir, f.Name)] = f.Data
		}
	}
	c.dress(t, xattrs, setup)
	c.age(t, said)
	return c
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// fill puts the world's names into a case's text, and empty takes them out of
// what was made of it.
func (c *testCase) fill(text string) string {
	return strings.NewReplacer("BASE", c.world.base, "WEB", c.web(), "KEY", c.world.key).Replace(text)
}

func (c *testCase) empty(text string) string {
	return strings.NewReplacer(c.world.base, "BASE", c.web(), "WEB", c.dir, "DIR").Replace(text)
}

func (c *testCase) web() string { return c.world.url + "/" + c.name }

func (c *testCase) readArgs(text string) {
	for line := range strings.Lines(text) {
		switch line = strings.TrimSpace(line); {
		case line == "":
		case strings.HasPrefix(line, "-"):
			c.args = append(c.args, line)
		default:
			c.context = line
		}
	}
}

// dress gives the context what only a file system can say.
func (c *testCase) dress(t *testing.T, xattrs, setup string) {
	t.Helper()
	for line := range strings.Lines(xattrs) {
		f := strings.Fields(line)
		if err := unix.Lsetxattr(filepath.Join(c.dir, f[0]), f[1], []byte(f[2]), 0); err != nil {
			t.Fatal(err)
		}
	}
	if setup != "" {
		cmd := exec.Command("sh", "-ec", setup)
		cmd.Dir = c.dir
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com",
			"GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com", "GIT_AUTHOR_DATE=1000000000 +0000", "GIT_COMMITTER_DATE=1000000000 +0000")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("setup: %v\n%s", err, out)
		}
	}
}

// age gives what has no time of its own one of long ago.
func (c *testCase) age(t *testing.T, said map[string][]byte) {
	t.Helper()
	err := filepath.WalkDir(c.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil || !undecided(fi.ModTime()) {
			return err
		}
		at := then
		if d.Type().IsRegular() {
			data, ok := said[p]
			if !ok {
				data = readFile(t, p)
			}
			at = thenOf(data)
		}
		ts := unix.NsecToTimespec(at.UnixNano())
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// update writes what came out into a case's file: as what is wanted, or as what
// varve makes of it.
func (c *testCase) update(t *testing.T, section, text string) {
	t.Helper()
	a, err := txtar.ParseFile(c.file)
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(a.Files, func(f txtar.File) bool { return f.Name == section })
	if at < 0 {
		at = len(a.Files)
		a.Files = append(a.Files, txtar.File{Name: section})
	}
	a.Files[at].Data = []byte(text)
	if err := os.WriteFile(c.file, txtar.Format(a), 0o644); err != nil {
		t.Fatal(err)
	}
}
