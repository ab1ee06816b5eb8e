package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// sample is what was seen from the end of one build to the end of the next.
type sample struct {
	took time.Duration
	heap int64 // bytes that live after a collection
	rss  int64 // most that daemon and children had together, in bytes
	hwm  int64 // of VmHWM, each one's own peak: never less than what they had
	disk int64 // most that the store's directory took
}

func (s sample) String() string {
	return fmt.Sprintf("%.1f s, heap %.1f MiB, VmRSS %.1f MiB, VmHWM %.1f MiB, store %.0f MiB",
		s.took.Seconds(), inMiB(s.heap), inMiB(s.rss), inMiB(s.hwm), inMiB(s.disk))
}

func inMiB(bytes int64) float64 { return float64(bytes) / mib }

const (
	memoryEvery = 100 * time.Millisecond
	diskEvery   = time.Second
)

// eye looks at a daemon in the background.
type eye struct {
	stop chan struct{}
	done sync.WaitGroup

	mu    sync.Mutex
	now   sample
	disk  int64 // of the last look at the store
	looks int   // at it
}

func watch(e *engine) *eye {
	w := &eye{stop: make(chan struct{})}
	w.every(memoryEvery, func() {
		rss, hwm := memory(e.cmd.Process.Pid)
		w.mu.Lock()
		w.now.rss, w.now.hwm = max(w.now.rss, rss), max(w.now.hwm, hwm)
		w.mu.Unlock()
	})
	w.every(diskEvery, func() {
		bytes := taken(e.store)
		w.mu.Lock()
		w.disk, w.now.disk = bytes, max(w.now.disk, bytes)
		w.looks++
		w.mu.Unlock()
	})
	return w
}

func (w *eye) every(d time.Duration, look func()) {
	w.done.Go(func() {
		for {
			look()
			select {
			case <-w.stop:
				return
			case <-time.After(d):
			}
		}
	})
}

func (w *eye) end() {
	close(w.stop)
	w.done.Wait()
}

// since returns what was seen since the last call, and begins anew.
func (w *eye) since() (s sample) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, w.now = w.now, sample{disk: w.disk}
	return s
}

// memory adds up VmRSS and VmHWM, in bytes, of a process and of all that stem from
// it.
func memory(pid int) (rss, hwm int64) {
	s := status(pid)
	rss, hwm = s["VmRSS"]<<10, s["VmHWM"]<<10
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, of := range threads {
		children, _ := os.ReadFile(of)
		for _, child := range strings.Fields(string(children)) {
			if n, err := strconv.Atoi(child); err == nil {
				r, h := memory(n)
				rss, hwm = rss+r, hwm+h
			}
		}
	}
	return rss, hwm
}

// status has the numbers of a process's status: sizes in KiB. One that has ended
// has none.
func status(pid int) map[string]int64 {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	values := map[string]int64{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if f := strings.Fields(value); len(f) > 0 {
			if n, err := strconv.ParseInt(f[0], 10, 64); err == nil {
				values[name] = n
			}
		}
	}
	return values
}

// taken is what is allocated below dir on its own file system, as du counts it.
// What goes meanwhile does not count.
func taken(dir string) (bytes int64) {
	var own uint64
	seen := map[uint64]bool{}
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		fi, err := d.Info()
		if err != nil {
			return nil
		}
		st := fi.Sys().(*syscall.Stat_t)
		if own == 0 {
			own = st.Dev
		}
		if st.Dev != own {
			return fs.SkipDir // a step's root file system, mounted
		}
		if !seen[st.Ino] {
			seen[st.Ino] = true
			bytes += st.Blocks * 512
		}
		return nil
	})
	return bytes
}

// heap has the daemon collect, twice for what pools hold on to, and returns the
// bytes that live.
func (e *engine) heap(ctx context.Context) (int64, error) {
	if _, err := e.ask(ctx, "/debug/gc"); err != nil {
		return 0, err
	}
	text, err := e.ask(ctx, "/debug/pprof/heap?gc=1&debug=1")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(text, "\n# HeapAlloc = ")
	number, _, _ := strings.Cut(rest, "\n")
	return strconv.ParseInt(number, 10, 64)
}

func (e *engine) ask(ctx context.Context, page string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://debug"+page, nil)
	if err != nil {
		return "", err
	}
	answer, err := e.debug.Do(req)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", page, answer.Status, body)
	}
	return string(body), err
}
