package faultcall

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Plan says what is to happen to which changes.
type Plan struct {
	Below []string // the directories, absolute and without links
	Calls []string // only these system calls count; nil: all
	At    int      // the change that fails, from 1; 0: none
	Error syscall.Errno
	// Stays is a full disk: from that change on all fail that may take space.
	// What never takes any, as an unlink, does not count then.
	Stays bool
	// Delay is how much longer each change takes.
	Delay time.Duration
}

// Flushes are the calls in which a program waits for its disk to have made
// something permanent.
func Flushes() []string { return []string{"fsync", "fdatasync", "syncfs"} }

// Change is one change that was told to fail, or counted.
type Change struct {
	Call string
	Path string
}

func (c Change) String() string { return c.Call + " " + c.Path }

// Watch watches one program, started once, with all that it starts.
type Watch struct {
	plan Plan

	mu     sync.Mutex // guards the rest
	seen   []Change
	failed []Change
	err    error
	ended  chan struct{}
}

// New returns a watch that has begun nothing.
func New(p Plan) *Watch { return &Watch{plan: p, ended: make(chan struct{})} }

// Start starts a program that calls [Enter].
func (w *Watch) Start(cmd *exec.Cmd) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs := os.NewFile(uintptr(pair[1]), "watched")
	words := append([]string{fmt.Sprint(3 + len(cmd.ExtraFiles))}, w.plan.Calls...)
	cmd.ExtraFiles = append(cmd.ExtraFiles, theirs)
	cmd.Env = append(cmd.Environ(), variable+"="+strings.Join(words, ","))
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return errors.Join(err, unix.Close(pair[0]))
	}
	go func() {
		defer close(w.ended)
		defer unix.Close(pair[0])
		if err := w.serve(pair[0]); err != nil {
			w.mu.Lock()
			w.err = err
			w.mu.Unlock()
		}
	}()
	return nil
}

// Wait waits until the program and all that it started have ended, for so long
// at most.
func (w *Watch) Wait(atMost time.Duration) error {
	select {
	case <-w.ended:
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.err
	case <-time.After(atMost):
		return fmt.Errorf("something that the watched program started still runs after %v", atMost)
	}
}

// Seen returns the changes in the order in which they came, and those that
// failed.
func (w *Watch) Seen() (all, failed []Change) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen, w.failed
}

// serve receives the listener and answers until nobody is left who could ask.
func (w *Watch) serve(socket int) error {
	listener, err := receive(socket)
	if err != nil || listener < 0 {
		return err
	}
	l := asker(listener)
	var slow sync.WaitGroup
	defer func() {
		slow.Wait()
		unix.Close(listener)
	}()
	l.wakeTogether()
	for {
		n, more, err := l.next()
		if err != nil || !more {
			return err
		}
		errno, counts := w.decide(l, n)
		if counts && w.plan.Delay > 0 {
			slow.Go(func() {
				time.Sleep(w.plan.Delay)
				l.answer(n, errno)
			})
		} else {
			l.answer(n, errno)
		}
	}
}

// decide counts what was asked about, if it is a change, and says with what it
// fails.
func (w *Watch) decide(l asker, n notice) (errno syscall.Errno, counts bool) {
	c := table[n.number]
	path, ok := c.target(n)
	// What was read may be another process's by now, if that one is gone.
	if !ok || !w.plan.covers(path) || !l.valid(n) {
		return 0, false
	}
	if w.plan.Stays && c.effect == changes {
		return 0, false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	change := Change{c.name, path}
	w.seen = append(w.seen, change)
	if !w.plan.fails(len(w.seen), c.effect) {
		return 0, true
	}
	w.failed = append(w.failed, change)
	return w.plan.Error, true
}

// fails tells whether the change number n does.
func (p Plan) fails(n int, e effect) bool {
	return p.At > 0 && (n == p.At || n > p.At && p.Stays && e == takes)
}

func (p Plan) covers(path string) bool {
	return slices.ContainsFunc(p.Below, func(dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") })
}
