package crashtest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// outcomes of damage to the database of an open store.
const (
	healed    = "noticed, rebuilt, all there"
	untouched = "the page is not in use"
)

// metaPages are those that bbolt's commits write in turn.
const metaPages = 2

// TestDamageWhileOpen makes pages of the database bad while the store is open,
// and has it checked. The database is made anew, and calls go on.
func TestDamageWhileOpen(t *testing.T) {
	d := newDamaged(t)
	var tally testkit.Tally
	for _, i := range d.cases(t, 40) {
		d.restore(t, d.db, d.log)
		kind, page, outcome := d.damageOpen(t, i)
		if _, _, wrong := d.open(t); len(wrong) > 0 {
			t.Errorf("%s, page %d, %s; opened after it:\n  %s", kind, page, outcome, strings.Join(wrong, "\n  "))
		}
		tally.Add(kind, outcome)
	}
	t.Logf("\n%s", tally.Table("a page under an open store", testkit.KindsOfPageDamage(), []string{healed, untouched}))
	if tally.Total(healed) == 0 {
		t.Error("no damage was noticed")
	}
}

// damageOpen opens the store, damages its database and uses it.
func (d *damaged) damageOpen(t *testing.T, i int) (kind string, page int, outcome string) {
	t.Helper()
	ctx := context.Background()
	k, err := daemon.Keep(ctx, daemon.Options{Root: d.dir, State: d.state}, nil)
	must(t, err)
	defer func() { must(t, k.Close(ctx)) }()
	path := filepath.Join(d.dir, layout.DatabaseFile)
	now, err := os.ReadFile(path)
	must(t, err)
	kind, page, bad := testkit.DamagePage(now, d.old, i)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt(bad[page*4096:min(len(bad), (page+1)*4096)], int64(page)*4096)
	must(t, err)
	must(t, f.Truncate(int64(len(bad))))

	outcome = untouched
	began := time.Now()
	// Each call may come upon something that the ones before did not.
	call := func(fn func() error) {
		t.Helper()
		err := fn()
		if errors.Is(err, varve.ErrReopened) {
			outcome, err = healed, fn()
		}
		if err != nil {
			t.Fatalf("%s, page %d: %v", kind, page, err)
		}
	}
	call(func() error {
		_, err := k.Fsck(ctx, varve.FsckRequest{Level: string(layout.Quick)}, nil)
		return err
	})
	if images := d.list(t, k, func(string) {}); !slices.Equal(images, d.images) {
		t.Errorf("%s, page %d, %s: images %q, there were %q", kind, page, outcome, images, d.images)
	}
	var c varve.Container
	call(func() (err error) {
		c, err = k.Create(ctx, varve.CreateRequest{Image: builtName, Command: []string{"true"}}, nil)
		return err
	})
	call(func() error { return k.RemoveContainer(ctx, c.ID) })
	if took := time.Since(began); took > slowestStart {
		t.Errorf("%s, page %d: it took %v", kind, page, took)
	}
	info, err := k.Info(ctx)
	must(t, err)
	told := strings.Join(info.Recovered, "\n")
	if page < metaPages && outcome == healed && told == "" {
		// What the daemon commits by itself, the measure of a directory for one,
		// has written the page again before anybody opened the store anew.
		outcome = untouched
	}
	if strings.Contains(told, "was rebuilt") != (outcome == healed) || strings.Contains(told, "lost: ") {
		t.Errorf("%s, page %d, %s: info tells %q", kind, page, outcome, told)
	}
	return kind, page, outcome
}
