package journal_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/durable"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// The child's orders, from the environment.
const (
	killRoot  = "VARVE_TEST_FENCE_ROOT"
	killPoint = "VARVE_TEST_FENCE_POINT"
)

func TestMain(m *testing.M) {
	if root := os.Getenv(killRoot); root != "" {
		if err := fenced(context.Background(), root, os.Getenv(killPoint)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var blobData = []byte("comes, goes and comes again")

func writeBlob(ctx context.Context, s *teststore.Store) error {
	d := digest.FromBytes(blobData)
	return ccontent.WriteBlob(ctx, s.Blobs, "blob", bytes.NewReader(blobData), ocispec.Descriptor{Digest: d, Size: int64(len(blobData))})
}

// meeting lets a publication run while the sweeper stands still at a point.
type meeting struct {
	at      string
	reached chan struct{}
	goOn    chan struct{}
}

func meetAt(point string, other func(string)) *meeting {
	m := &meeting{at: point, reached: make(chan struct{}), goOn: make(chan struct{})}
	var once bool
	durable.OnPoint(func(p string) {
		if p == m.at && !once {
			once = true
			close(m.reached)
			<-m.goOn
		}
		other(p)
	})
	return m
}

// fenced brings a blob again while its removal stands still, and is killed at
// point.
func fenced(ctx context.Context, dir, point string) error {
	kill := func(p string) {
		if p == point {
			fmt.Println("killed at", p)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	s, err := teststore.Open(ctx, dir)
	if err != nil {
		return err
	}
	if point == layout.PointCacheMountClaimed {
		durable.OnPoint(kill)
		if err := os.MkdirAll(s.Root.Path(layout.CacheMountPath("mount/sub")), 0o755); err != nil {
			return err
		}
		return s.Journal.Trash(ctx, layout.MountNode("mount"), func(*metadata.Tx) (layout.Usage, error) { return layout.Usage{Bytes: 4096}, nil })
	}
	if err := writeBlob(ctx, s); err != nil {
		return err
	}
	sweeper := map[string]string{layout.PointFenceTaken: layout.PointSweepRecorded, layout.PointFenceTrashed: layout.PointSweepTrashed}[point]
	m := meetAt(sweeper, kill)
	if err := s.Blobs.Delete(ctx, digest.FromBytes(blobData)); err != nil {
		return err
	}
	<-m.reached
	if err := writeBlob(ctx, s); err != nil {
		return err
	}
	return fmt.Errorf("the blob was brought again, and %s did not fire", point)
}

// TestKillInTheFence kills a process where a publication and a removal of the
// same name meet.
func TestKillInTheFence(t *testing.T) {
	testkit.NeedRoot(t)
	for _, point := range []string{layout.PointFenceTaken, layout.PointFenceTrashed, layout.PointCacheMountClaimed} {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), killRoot+"="+dir, killPoint+"="+point)
			out, err := cmd.CombinedOutput()
			if !strings.Contains(string(out), "killed at "+point) {
				t.Fatalf("%v: %s", err, out)
			}
			for range 2 {
				s, err := teststore.Open(t.Context(), dir)
				must(t, err)
				if point == layout.PointCacheMountClaimed {
					if _, err := os.Lstat(s.Root.Path(layout.CacheMountPath("mount"))); err == nil {
						t.Error("the cache mount has its name still")
					}
				} else if _, err := s.Blobs.Info(t.Context(), digest.FromBytes(blobData)); err != nil {
					t.Errorf("the blob whose intent was written: %v", err)
				}
				must(t, s.End())
			}
		})
	}
}

// TestPublishBesideRemoval brings a blob again while its removal stands still at
// each of its points. It never waits for the deleting, only until the name is
// free.
func TestPublishBesideRemoval(t *testing.T) {
	for _, point := range []string{layout.PointSweepRecorded, layout.PointSweepClaimed, layout.PointSweepTrashed, layout.PointSweepDeleted} {
		t.Run(point, func(t *testing.T) {
			s := teststore.New(t)
			ctx := t.Context()
			must(t, writeBlob(ctx, s))
			m := meetAt(point, func(string) {})
			defer durable.OnPoint(nil)
			must(t, s.Blobs.Delete(ctx, digest.FromBytes(blobData)))
			<-m.reached
			done := make(chan error, 1)
			go func() { done <- writeBlob(ctx, s) }()
			select {
			case err := <-done:
				must(t, err)
				if point == layout.PointSweepClaimed {
					t.Error("it did not wait until the name was free")
				}
				close(m.goOn)
			case <-time.After(300 * time.Millisecond):
				if point != layout.PointSweepClaimed {
					t.Error("it waits for the deleting")
				}
				close(m.goOn)
				must(t, <-done)
			}
			must(t, s.Journal.Drain(ctx))
			if _, err := s.Blobs.Info(ctx, digest.FromBytes(blobData)); err != nil {
				t.Errorf("the blob is gone: %v", err)
			}
		})
	}
}
