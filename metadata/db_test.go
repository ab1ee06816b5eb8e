package metadata

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"

	"varve.dev/durable"
	"varve.dev/durable/crashsim"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

func TestCreateAndReopen(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	id := db.Meta().ID
	doUpdate(t, db, func(tx *Tx) error { return tx.Blobs().Put(digestOf(1), layout.BlobRecord{Size: 7}) })
	must(t, db.Close())
	must(t, db.Close()) // again is no error
	if err := db.Update(t.Context(), func(*Tx) error { return nil }); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("update after close: %v", err)
	}
	if err := db.View(t.Context(), func(*Tx) error { return nil }); err == nil {
		t.Error("view after close succeeds")
	}
	db, err = Open(root, Options{})
	must(t, err)
	defer db.Close()
	if db.Meta().ID != id {
		t.Errorf("the store's id changed from %s to %s", id, db.Meta().ID)
	}
	view(t, db, func(tx *Tx) error {
		rec, err := tx.Blobs().Get(digestOf(1))
		if err == nil && rec.Size != 7 {
			t.Errorf("size %d", rec.Size)
		}
		return err
	})
}

// What a crash left under the temporary name does not hinder creation, nor
// stay (T-C2).
func TestCreateOverLeftover(t *testing.T) {
	for name, content := range map[string][]byte{
		"empty": {}, "zeros": make([]byte, 16384), "garbage": []byte("no database at all"),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			must(t, os.WriteFile(filepath.Join(dir, temporaryDatabase), content, 0o600))
			db := openDB(t, dir)
			if db.Meta().Format != layout.FormatVersion {
				t.Errorf("format %d", db.Meta().Format)
			}
			if _, err := os.Lstat(filepath.Join(dir, temporaryDatabase)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("temporary database: %v", err)
			}
		})
	}
}

// At every change during creation a power cut leaves something from which
// opening makes a store, and an acknowledged record is there.
func TestCreateSurvivesPowerCuts(t *testing.T) {
	needRoot(t)
	dir, scratch := t.TempDir(), t.TempDir()
	root := openRoot(t, dir)
	var db *DB
	sim, err := crashsim.Attach(root, crashsim.Database{Name: layout.DatabaseFile, Copy: func(w io.Writer) error {
		data, err := os.ReadFile(filepath.Join(dir, layout.DatabaseFile))
		if err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	}})
	must(t, err)
	n := 0
	sim.Every(1, func(at crashsim.Moment) {
		for _, mode := range []crashsim.Mode{crashsim.None, crashsim.All, crashsim.Some} {
			n++
			image := filepath.Join(scratch, fmt.Sprint(n))
			must(t, at.Image(image, mode, uint64(n)))
			r, err := durable.Open(image)
			must(t, err)
			again, err := Open(r, Options{})
			if err != nil {
				t.Errorf("image %d (%s after change %d): %v", n, mode, at.N, err)
			} else {
				again.Close()
			}
			r.Close()
		}
	})
	db, err = Open(root, Options{})
	must(t, err)
	sim.Detach()
	must(t, sim.Err())
	must(t, db.Close())
	if n < 2*3 {
		t.Errorf("only %d images", n)
	}
}

func TestNewerFormatIsRefused(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	must(t, db.Close())
	b, err := bolt.Open(filepath.Join(dir, layout.DatabaseFile), 0o600, nil)
	must(t, err)
	must(t, b.Update(func(tx *bolt.Tx) error {
		value, err := layout.Encode(layout.MetaKey, layout.MetaRecord{Format: layout.FormatVersion + 1})
		if err != nil {
			return err
		}
		return tx.Bucket([]byte(layout.BucketMeta)).Put([]byte(layout.MetaKey), value)
	}))
	must(t, b.Close())
	if _, err := Open(root, Options{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("open: %v", err)
	}
	// The refusal must have let go of the lock.
	if _, err := Open(root, Options{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("open again: %v", err)
	}
}

func TestMissingBucketIsCorrupt(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	must(t, db.Close())
	b, err := bolt.Open(filepath.Join(dir, layout.DatabaseFile), 0o600, nil)
	must(t, err)
	must(t, b.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte(layout.BucketSweeps)) }))
	must(t, b.Close())
	_, err = Open(root, Options{})
	if c := errdefs.AsCorrupt(err); c == nil || c.Invariant != "M2" {
		t.Errorf("open: %v", err)
	}
}

func init() {
	// holder opens the store, says so, and keeps it until its input ends.
	roles["holder"] = func(args []string) error {
		root, err := durable.Create(args[0], 0o711)
		if err != nil {
			return err
		}
		db, err := Open(root, Options{})
		if errors.Is(err, ErrLocked) {
			fmt.Println("locked")
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Println(db.Meta().ID)
		_, _ = io.Copy(io.Discard, os.Stdin)
		return db.Close()
	}
}

// startHolder returns what the process says first, and a function that ends
// it.
func startHolder(t *testing.T, dir string) (string, func()) {
	t.Helper()
	cmd := child(t, "holder", dir)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	must(t, err)
	return line[:len(line)-1], func() {
		in.Close()
		must(t, cmd.Wait())
	}
}

func TestOneOpener(t *testing.T) {
	dir := t.TempDir()
	id, end := startHolder(t, dir)
	root := openRoot(t, dir)
	if _, err := Open(root, Options{}); !errors.Is(err, ErrLocked) || !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("second opener: %v", err)
	}
	end()
	db, err := Open(root, Options{})
	must(t, err)
	defer db.Close()
	if db.Meta().ID != id {
		t.Errorf("another store: %s, was %s", db.Meta().ID, id)
	}
}

// Of processes that create the same store at once one makes it, and each is
// told its id or that it is in use.
func TestConcurrentCreation(t *testing.T) {
	for range 5 {
		dir := t.TempDir()
		const n = 6
		cmds := make([]*exec.Cmd, n)
		outs := make([]*bufio.Reader, n)
		ins := make([]io.Closer, n)
		for i := range cmds {
			cmds[i] = child(t, "holder", dir)
			in, err := cmds[i].StdinPipe()
			must(t, err)
			out, err := cmds[i].StdoutPipe()
			must(t, err)
			ins[i], outs[i] = in, bufio.NewReader(out)
			must(t, cmds[i].Start())
		}
		owners := 0
		for i := range cmds {
			line, err := outs[i].ReadString('\n')
			must(t, err)
			if line != "locked\n" {
				owners++
				ins[i].Close() // the next may have it
			}
		}
		for i := range cmds {
			ins[i].Close()
			must(t, cmds[i].Wait())
		}
		if owners == 0 {
			t.Error("nobody got the store")
		}
		entries, err := os.ReadDir(dir)
		must(t, err)
		if len(entries) != 2 || entries[0].Name() != layout.DatabaseFile || entries[1].Name() != layout.LogFile {
			t.Errorf("the root holds %v", entries)
		}
		checkFile(t, filepath.Join(dir, layout.DatabaseFile))
	}
}
