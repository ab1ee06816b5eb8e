package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"varve.dev/benchmarks/bench"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
)

const (
	// together is how many layers go at once.
	together = 10
	// sweepRounds is how often they do.
	sweepRounds = 15
)

// sweep removes few layers of few and of many: what the removal costs must not
// grow with what stays.
func sweep(ctx context.Context, b *trial) error {
	rows := [][]string{{"", "layers", "p50", "max", "ratio of p50"}}
	add := func(name string, counts []int, took []bench.Times) {
		for i, n := range counts {
			rows = append(rows, []string{name, fmt.Sprint(n), bench.MS(took[i].At(50)), bench.MS(took[i].At(100)), bench.Ratio(took[i].At(50), took[0].At(50))})
		}
	}
	const least = together * sweepRounds
	if b.layers/100 < least || b.theirs/10 < least {
		return fmt.Errorf("the smaller stores need %d layers", least)
	}
	counts := []int{b.layers / 100, b.layers}
	took, err := sweepOurs(ctx, b, counts)
	if err != nil {
		return fmt.Errorf("varve: %w", err)
	}
	add("varve", counts, took)
	_, missing := exec.LookPath("containerd")
	switch {
	case !b.peers:
	case missing != nil:
		fmt.Println("containerd is left out: it is not installed")
	default:
		counts := []int{b.theirs / 10, b.theirs}
		took, err := sweepTheirs(ctx, b, counts)
		if err != nil {
			return fmt.Errorf("containerd: %w", err)
		}
		add("ctr images rm --sync", counts, took)
	}
	bench.Table(fmt.Sprintf("%d layers are removed, %d times, until their files are deleted", together, sweepRounds), rows...)
	return nil
}

// sweepOurs has the stores open side by side, and takes turns.
func sweepOurs(ctx context.Context, b *trial, counts []int) ([]bench.Times, error) {
	var stores []*teststore.Store
	for _, n := range counts {
		dir, err := b.Mkdir(fmt.Sprintf("store-%d", n))
		if err != nil {
			return nil, err
		}
		s, err := teststore.Open(ctx, dir)
		if err != nil {
			return nil, err
		}
		b.AtEnd(s.Close)
		if err := fill(ctx, s, n); err != nil {
			return nil, err
		}
		stores = append(stores, s)
	}
	unix.Sync()
	took := make([]bench.Times, len(stores))
	for round := range sweepRounds {
		for i, s := range stores {
			begin := time.Now()
			err := s.DB.Update(ctx, func(tx *metadata.Tx) error { return tx.Drop(layout.LeaseNode(victims(round))) })
			if err == nil {
				release := s.Journal.Hurry()
				s.Journal.Kick()
				err = s.Journal.Drain(ctx)
				release()
			}
			if err != nil {
				return nil, err
			}
			took[i] = append(took[i], time.Since(begin))
			left, err := os.ReadDir(s.Root.Path(layout.LayersDir))
			if want := counts[i] - (round+1)*together; err == nil && len(left) != want {
				err = fmt.Errorf("%d layers are left, and should be %d", len(left), want)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return took, nil
}

// victims is who holds the layers that go in a round.
func victims(round int) layout.LeaseID { return layout.LeaseID(fmt.Sprintf("victims-%d", round)) }

// fill gives a store layers of one file each, in few transactions: as publications
// leave them, but for the files' lists.
func fill(ctx context.Context, s *teststore.Store, n int) error {
	const batch = 5000
	now := time.Now().UTC()
	for from := 0; from < n; from += batch {
		if err := ctx.Err(); err != nil {
			return err
		}
		to := min(from+batch, n)
		ids := make([]layout.LayerID, to-from)
		for i := range ids {
			ids[i] = layout.LayerID(layout.NewID())
			tree := filepath.Join(s.Root.Path(layout.LayerPath(ids[i])), layout.TreeDir)
			if err := os.MkdirAll(tree, 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(tree, "file"), nil, 0o600); err != nil {
				return err
			}
		}
		err := s.DB.Update(ctx, func(tx *metadata.Tx) error {
			for i, id := range ids {
				holder := layout.LeaseID("rest")
				if (from+i)/together < sweepRounds {
					holder = victims((from + i) / together)
				}
				key := layout.SnapshotKey("snapshot-" + string(id))
				if err := errors.Join(
					tx.PutLayer(id, layout.LayerRecord{Size: 8192, Inodes: 3, Created: now}),
					tx.PutSnapshot(key, layout.SnapshotRecord{Kind: layout.SnapshotCommitted, Layer: id}),
					tx.Leases().Put(holder, layout.LeaseRecord{Created: now}),
					tx.Link(layout.Edge{Parent: layout.LeaseNode(holder), Rel: layout.RelHolds, Child: layout.SnapshotNode(key)}),
				); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// sweepTheirs does the same with containerd and images of so many layers each.
func sweepTheirs(ctx context.Context, b *trial, counts []int) ([]bench.Times, error) {
	var engines []*containerd
	for _, n := range counts {
		dir, err := b.Mkdir(fmt.Sprintf("containerd-%d", n))
		if err != nil {
			return nil, err
		}
		started, err := startContainerd(ctx, b, dir)
		if err != nil {
			return nil, err
		}
		e := started.(*containerd)
		engines = append(engines, e)
		archive := filepath.Join(b.Dir, fmt.Sprintf("images-%d", n))
		if err := manyImages(archive, n/together); err != nil {
			return nil, err
		}
		begin := time.Now()
		if _, err := bench.Output(ctx, nil, "sh", "-c", fmt.Sprintf("tar -C %s -c . | ctr -a %s images import --base-name many -", archive, e.socket)); err != nil {
			return nil, err
		}
		if err := e.counts(ctx, n); err != nil {
			return nil, err
		}
		fmt.Printf("containerd has unpacked %d layers in %s\n", n, bench.MS(time.Since(begin)))
	}
	unix.Sync()
	took := make([]bench.Times, len(engines))
	for round := range sweepRounds {
		for i, e := range engines {
			begin := time.Now()
			if _, err := e.run(ctx, "images", "rm", "--sync", fmt.Sprintf("many:v%d", round)); err != nil {
				return nil, err
			}
			took[i] = append(took[i], time.Since(begin))
			if err := e.counts(ctx, counts[i]-(round+1)*together); err != nil {
				return nil, err
			}
		}
	}
	return took, nil
}

// counts sees that there are so many snapshots.
func (e *containerd) counts(ctx context.Context, want int) error {
	list, err := e.run(ctx, "snapshots", "ls")
	if have := strings.Count(list, "\n") - 1; err == nil && have != want {
		err = fmt.Errorf("%d snapshots are there, and should be %d", have, want)
	}
	return err
}

// manyImages makes a layout of images that have no layer in common.
func manyImages(dir string, n int) error {
	l, err := testkit.NewLayout(dir)
	if err != nil {
		return err
	}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	index.SchemaVersion = 2
	for i := range n {
		var stack []testkit.Layer
		for k := range together {
			text := fmt.Sprintf("image %d, layer %d", i, k)
			layer, err := l.AddLayer(testkit.Gzip, text, func(b *testkit.LayerBuilder) { b.Text(fmt.Sprintf("file-%d", k), text) })
			if err != nil {
				return err
			}
			stack = append(stack, layer)
		}
		desc, err := l.AddImage(ocispec.ImageConfig{Cmd: []string{"true"}}, stack...)
		if err != nil {
			return err
		}
		desc.Annotations = map[string]string{ocispec.AnnotationRefName: fmt.Sprintf("v%d", i)}
		index.Manifests = append(index.Manifests, desc)
	}
	if _, err := l.Finish("many", index.Manifests[0]); err != nil {
		return err
	}
	data, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, ocispec.ImageIndexFile), data, 0o600)
}
