// Command deep times a deep check beside `find -type f | xargs sha256sum` over
// the same blobs and trees, in turn, with the caches dropped before each run and
// then with what the one before has left in them; and says how much memory the
// check of a store with very many files takes at most.
//
//	go run ./benchmarks/deep [-n PAIRS] [-varve bin/varve] [-layers N -files N]
//
// -files of each of -layers layers make the large store; 0 leaves it out.
// It wants root and `make build`.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/internal/testkit"
)

func main() {
	pairs := flag.Int("n", 5, "pairs of runs")
	varve := flag.String("varve", "bin/varve", "path of the command")
	layers := flag.Int("layers", 4, "layers of the store with very many files")
	files := flag.Int("files", 250_000, "files of each; 0: no such store")
	flag.Parse()
	err := run(*varve, *pairs, *layers, *files)
	if err != nil {
		fmt.Fprintln(os.Stderr, "deep:", err)
		os.Exit(1)
	}
}

func run(varve string, pairs, layers, files int) error {
	big, err := testkit.MakeBig()
	if err != nil {
		return err
	}
	if err := in(varve, big, func(s store) error { return compare(s, pairs) }); err != nil || files == 0 {
		return err
	}
	many, err := testkit.MakeMany(layers, files)
	if err != nil {
		return err
	}
	return in(varve, many, func(s store) error {
		took, peak, report, err := s.check()
		if err != nil {
			return err
		}
		fmt.Printf("%d names in %d layers: %.1f s, peak memory %d MiB\n", report.Files, report.Layers, took.Seconds(), peak>>20)
		return nil
	})
}

// store is one that holds an image and nothing else.
type store struct{ varve, dir string }

// in makes a store, and removes it in the end.
func in(varve string, img testkit.Image, do func(store) error) error {
	varve, err := filepath.Abs(varve)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("/var/tmp", "varve-deep-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s := store{varve, dir}
	archive := img.Archive()
	defer archive.Close()
	load := s.command("load")
	load.Stdin = archive
	if out, err := load.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w: %s", load, err, out)
	}
	return do(s)
}

func (s store) command(args ...string) *exec.Cmd {
	cmd := exec.Command(s.varve, args...)
	cmd.Env = append(os.Environ(), "VARVE_ROOT="+filepath.Join(s.dir, "root"), "VARVE_STATE="+filepath.Join(s.dir, "state"))
	return cmd
}

type report struct {
	Files, Bytes  int64
	Layers, Blobs int
}

// check makes a deep check and returns its time and most memory, in bytes.
func (s store) check() (took time.Duration, peak int64, r report, err error) {
	cmd := s.command("fsck", "--deep", "--json")
	begin := time.Now()
	out, err := cmd.Output()
	took = time.Since(begin)
	if err == nil {
		err = json.Unmarshal(out, &r)
	}
	if err != nil {
		return 0, 0, r, fmt.Errorf("%v: %w: %s", cmd, err, out)
	}
	return took, cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10, r, nil
}

// sums reads the same files without knowing what they have to be.
func (s store) sums(processes int) (time.Duration, error) {
	const script = `find "$1/root/blobs" "$1/root/layers" -type f -print0 | xargs -0 -P "$2" sha256sum >/dev/null`
	cmd := exec.Command("sh", "-c", script, "sh", s.dir, fmt.Sprint(processes))
	begin := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%v: %w: %s", cmd, err, out)
	}
	return time.Since(begin), nil
}

func compare(s store, pairs int) error {
	for _, cold := range []bool{true, false} {
		var check, one, two []float64
		var last report
		var most int64
		for range pairs {
			prepare(cold)
			took, peak, r, err := s.check()
			if err != nil {
				return err
			}
			last, most = r, max(most, peak)
			check = append(check, took.Seconds())
			for processes, into := range map[int]*[]float64{1: &one, 2: &two} {
				prepare(cold)
				took, err := s.sums(processes)
				if err != nil {
					return err
				}
				*into = append(*into, took.Seconds())
			}
		}
		caches := map[bool]string{true: "caches dropped", false: "caches warm"}[cold]
		fmt.Printf("%s: %d names, %d bytes, peak memory %d MiB; fsck --deep %.2f s %.2f\n", caches, last.Files, last.Bytes, most>>20, median(check), check)
		for processes, times := range map[int][]float64{1: one, 2: two} {
			fmt.Printf("    xargs -P %d sha256sum %.2f s %.2f: fsck has %.2f of its throughput\n", processes, median(times), times, ratio(times, check))
		}
	}
	return nil
}

// prepare drops the caches, or leaves them.
func prepare(cold bool) {
	if cold {
		unix.Sync()
		_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0) // refused in a container: then it is warm
	}
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return (v[len(v)/2] + v[(len(v)-1)/2]) / 2
}

// ratio is the median of a/b over the pairs.
func ratio(a, b []float64) float64 {
	all := make([]float64, len(a))
	for i := range a {
		all[i] = a[i] / b[i]
	}
	return median(all)
}
