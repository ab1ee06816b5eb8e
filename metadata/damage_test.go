package metadata

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

const damageRecords = 500

// fillDamageable makes a database with branch pages, overflow pages, free
// pages and every kind of record that is read below. It returns what the file
// was after each commit.
func fillDamageable(t *testing.T, dir string) (old [][]byte) {
	t.Helper()
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	const each = 100
	for from := 0; from < damageRecords; from += each {
		data, err := os.ReadFile(filepath.Join(dir, layout.DatabaseFile))
		must(t, err)
		old = append(old, data)
		doUpdate(t, db, func(tx *Tx) error {
			for i := from; i < from+each; i++ {
				if err := tx.Blobs().Put(digestOf(i), damageRecord(i)); err != nil {
					return err
				}
				if err := tx.PutImage(imageName(i), layout.ImageRecord{}); err != nil {
					return err
				}
				if err := tx.Link(damageEdge(i)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	must(t, db.Close())
	return old
}

func damageRecord(i int) layout.BlobRecord {
	rec := layout.BlobRecord{Size: int64(i)}
	if i%100 == 0 { // larger than a page
		rec.Labels = map[string]string{"long": strings.Repeat("l", 9000)}
	}
	return rec
}

func imageName(i int) string { return fmt.Sprintf("registry.example/repository/image-%05d:tag", i) }

func damageEdge(i int) layout.Edge {
	return layout.Edge{Parent: layout.ImageNode(imageName(i)), Rel: layout.RelTarget, Child: layout.BlobNode(digestOf(i))}
}

// outcomes of opening and using a damaged database.
const (
	unharmed = "nothing is missing"
	refused  = "noticed when opened"
	reported = "noticed when used"
	silent   = "records missing without a word"
	wrong    = "WRONG"
)

// useDamaged does with a damaged database what a store does, and says what
// came of it.
func useDamaged(dir, whole string) (string, error) {
	root, err := durable.Open(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	db, err := Open(root, Options{})
	if err != nil {
		if errdefs.AsCorrupt(err) == nil && !errors.Is(err, errdefs.ErrFailedPrecondition) {
			return wrong, fmt.Errorf("open: not of kind Corrupt: %w", err)
		}
		return refused, nil
	}
	defer db.Close()
	result, err := readDamaged(db)
	if err != nil {
		return result, err
	}
	if hash, err := db.hash(); err == nil && hash != whole && result == unharmed {
		result = silent
	}
	for i := 0; i < damageRecords; i += 7 {
		err := db.Update(context.Background(), func(tx *Tx) error {
			if err := tx.Drop(layout.ImageNode(imageName(i))); err != nil {
				return err
			}
			return tx.Blobs().Put(digestOf(damageRecords+i), layout.BlobRecord{})
		})
		if err != nil {
			if !errdefs.Has(err) {
				return wrong, fmt.Errorf("update: no kind: %w", err)
			}
			return reported, fmt.Errorf("update: %.200s", strings.ReplaceAll(err.Error(), "\n", " "))
		}
		i += 50
	}
	return result, nil
}

func readDamaged(db *DB) (string, error) {
	result := unharmed
	for i := range damageRecords {
		var rec layout.BlobRecord
		var linked bool
		err := db.View(context.Background(), func(tx *Tx) (err error) {
			linked = tx.Referenced(layout.BlobNode(digestOf(i)))
			rec, err = tx.Blobs().Get(digestOf(i))
			return err
		})
		switch {
		case err == nil && (rec.Size != int64(i) || len(rec.Labels) != len(damageRecord(i).Labels)):
			return wrong, fmt.Errorf("record %d reads %d", i, rec.Size)
		case errors.Is(err, errdefs.ErrDataLoss):
			result = reported
		case errors.Is(err, errdefs.ErrNotFound), err == nil && !linked:
			if result == unharmed {
				result = silent
			}
		case err != nil:
			return wrong, fmt.Errorf("record %d: %w", i, err)
		}
	}
	n := 0
	err := db.View(context.Background(), func(tx *Tx) error {
		n = 0
		return tx.Images().Each("", func(string, layout.ImageRecord) error { n++; return nil })
	})
	if err != nil {
		result = reported
	} else if n != damageRecords && result == unharmed {
		result = silent
	}
	return result, nil
}

func init() {
	// damage DIR SCRATCH FIRST STEP works through cases of the database in
	// DIR and says how each ended.
	roles["damage"] = func(args []string) error {
		files, old, err := damageFiles(args[0])
		if err != nil {
			return err
		}
		whole, err := hashOf(args[0])
		if err != nil {
			return err
		}
		first, _ := strconv.Atoi(args[2])
		step, _ := strconv.Atoi(args[3])
		for i := first; i < testkit.PageDamages(files[layout.DatabaseFile]); i += step {
			kind, page, bad := testkit.DamagePage(files[layout.DatabaseFile], old, i)
			dir := filepath.Join(args[1], strconv.Itoa(i))
			err := errors.Join(os.Mkdir(dir, 0o700),
				os.WriteFile(filepath.Join(dir, layout.DatabaseFile), bad, 0o600),
				os.WriteFile(filepath.Join(dir, layout.LogFile), files[layout.LogFile], 0o600))
			if err != nil {
				return err
			}
			fmt.Printf("begin\t%d\t%s\t%d\n", i, kind, page)
			result, err := useDamaged(dir, whole)
			fmt.Printf("end\t%s\t%v\n", result, err)
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
		return nil
	}
}

// damageFiles reads the files of a store, and its database's older states.
func damageFiles(dir string) (files map[string][]byte, old [][]byte, err error) {
	files = map[string][]byte{}
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	for _, name := range names {
		data, rerr := os.ReadFile(name)
		if rerr != nil {
			return nil, nil, rerr
		}
		files[filepath.Base(name)] = data
		if strings.HasPrefix(filepath.Base(name), oldDatabase) {
			old = append(old, data)
		}
	}
	return files, old, err
}

// hashOf hashes everything that a database holds.
func hashOf(dir string) (string, error) {
	root, err := durable.Open(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	db, err := Open(root, Options{})
	if err != nil {
		return "", err
	}
	defer db.Close()
	return db.hash()
}

func (db *DB) hash() (string, error) {
	h := sha256.New()
	err := db.View(context.Background(), func(tx *Tx) error {
		return tx.bolt.ForEach(func(name []byte, b *bolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				_, err := fmt.Fprintf(h, "%q %q %q\n", name, k, v)
				return err
			})
		})
	})
	return string(h.Sum(nil)), err
}

// oldDatabase begins the names of what a database was before.
const oldDatabase = "old-"

// slowest is how long one damaged database may keep its user.
const slowest = 10 * time.Second

// TestEveryDamagedPage makes each page of a database bad in many ways. A
// process that opens and uses it must not crash, hang, or be told anything
// that was never stored (PROMISES 8), and no record is missing from it without
// a word.
func TestEveryDamagedPage(t *testing.T) {
	base := t.TempDir()
	for i, data := range fillDamageable(t, base) {
		must(t, os.WriteFile(filepath.Join(base, oldDatabase+strconv.Itoa(i)), data, 0o600))
	}
	file, err := os.ReadFile(filepath.Join(base, layout.DatabaseFile))
	must(t, err)
	step := 11
	if os.Getenv("VARVE_ALL_DAMAGE") != "" {
		step = 1
	}
	var tally testkit.Tally
	for next := 0; next < testkit.PageDamages(file); {
		next = runDamage(t, base, next, step, &tally)
	}
	t.Logf("%d pages\n%s", len(file)/4096, tally.Table("a page of a database by itself", testkit.KindsOfPageDamage(), []string{unharmed, refused, reported, silent}))
	if tally.Total(refused) == 0 || tally.Total(unharmed) == 0 {
		t.Error("not every sort of damage")
	}
	if n := tally.Total(silent); n > 0 {
		t.Errorf("%d cases that nobody noticed", n)
	}
}

// runDamage runs one process over the cases from next on. It returns where to
// go on: behind the case that killed the process, or the end.
func runDamage(t *testing.T, base string, next, step int, tally *testkit.Tally) int {
	t.Helper()
	scratch := t.TempDir()
	if shm, err := os.MkdirTemp("/dev/shm", "varve-damage-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(shm) })
		scratch = shm
	}
	cmd := child(t, "damage", base, scratch, strconv.Itoa(next), strconv.Itoa(step))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	watch := time.AfterFunc(slowest, func() { _ = cmd.Process.Kill() })
	kind, page, open := "", "", false
	for lines := bufio.NewScanner(out); lines.Scan(); {
		watch.Reset(slowest)
		word := strings.Split(lines.Text(), "\t")
		if word[0] == "begin" {
			next, _ = strconv.Atoi(word[1])
			kind, page, open = word[2], word[3], true
			continue
		}
		open = false
		tally.Add(kind, word[1])
		if word[1] == wrong || word[1] == silent || word[1] == reported {
			t.Errorf("%s, page %s: %s: %s", kind, page, word[1], word[2])
		}
	}
	watch.Stop()
	if err := cmd.Wait(); err != nil {
		text := stderr.String()
		t.Errorf("case %d, %s, page %s (under way: %v): %v\n%.2000s", next, kind, page, open, err, text)
		return next + step
	}
	return 1 << 40
}

// A file that loses its end while it is in use gives Corrupt, and neither a
// dead process nor one that waits for ever, not even to close.
func TestTruncatedWhileOpen(t *testing.T) {
	dir := t.TempDir()
	fillDamageable(t, dir)
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	must(t, os.Truncate(filepath.Join(dir, layout.DatabaseFile), 8192))
	for i := range 20 {
		err = errors.Join(
			db.View(t.Context(), func(tx *Tx) error { _, err := tx.Blobs().Get(digestOf(i)); return err }),
			db.Update(t.Context(), func(tx *Tx) error { return tx.Blobs().Delete(digestOf(i)) }))
		if errdefs.AsCorrupt(err) == nil {
			t.Errorf("record %d: %v", i, err)
		}
	}
	db.Close()
	// The lock is free again.
	if _, err := Open(root, Options{}); errdefs.AsCorrupt(err) == nil {
		t.Errorf("open again: %v", err)
	}
}
