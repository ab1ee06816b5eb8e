package metadata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// roleVar makes the test binary one of the processes of a test.
const roleVar = "VARVE_METADATA_ROLE"

var roles = map[string]func(args []string) error{}

func TestMain(m *testing.M) {
	role := os.Getenv(roleVar)
	if role == "" {
		os.Exit(m.Run())
	}
	if err := roles[role](os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// child prepares this binary in another role. It dies with the test.
func child(t testing.TB, role string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), roleVar+"="+role)
	cmd.Stderr = os.Stderr
	return cmd
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_ROOT") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func openRoot(t testing.TB, dir string) *durable.Root {
	t.Helper()
	root, err := durable.Create(dir, 0o711)
	must(t, err)
	t.Cleanup(func() { root.Close() })
	return root
}

// openDB opens a database that checks itself at each commit, and once more in
// full at the end of the test.
func openDB(t testing.TB, dir string) *DB {
	t.Helper()
	db, err := Open(openRoot(t, dir), Options{})
	must(t, err)
	db.h.bolt.StrictMode = true
	t.Cleanup(func() {
		checkAccounts(t, db)
		db.Close()
		checkFile(t, filepath.Join(dir, layout.DatabaseFile))
	})
	return db
}

// length counts the records of a table.
func length[K ~string, R any](t Table[K, R]) int { return t.bucket.Stats().KeyN }

func newDB(t testing.TB) *DB { return openDB(t, t.TempDir()) }

// checkAccounts compares the accounts and uses of a database that is open and
// well with what they are counted anew.
func checkAccounts(t testing.TB, db *DB) {
	t.Helper()
	undo := errors.New("undone")
	err := db.Update(context.Background(), func(tx *Tx) error {
		if err := tx.checkAccounts(); err != nil {
			return err
		}
		return undo
	})
	if c := errdefs.AsCorrupt(err); c != nil && (c.Invariant == "A1" || c.Invariant == "E5") {
		t.Error(err)
	}
}

// checkFile has bbolt and the page check look at a closed database.
func checkFile(t testing.TB, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		return // a test that removed it
	}
	defer f.Close()
	if err := checkPages(f, true); err != nil {
		t.Error(err)
	}
	b, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		t.Errorf("check %s: %v", path, err)
		return
	}
	defer b.Close()
	_ = b.View(func(tx *bolt.Tx) error {
		for err := range tx.Check() {
			t.Errorf("check %s: %v", path, err)
		}
		return nil
	})
}

func doUpdate(t testing.TB, db *DB, fn func(*Tx) error) {
	t.Helper()
	must(t, db.Update(t.Context(), fn))
}

func view(t testing.TB, db *DB, fn func(*Tx) error) {
	t.Helper()
	must(t, db.View(t.Context(), fn))
}

// digestOf makes up a digest.
func digestOf(i int) layout.BlobDigest {
	return layout.BlobDigest(fmt.Sprintf("sha256:%064x", i))
}
