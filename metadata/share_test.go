package metadata

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"varve.dev/durable"
	"varve.dev/layout"
)

// The bet behind the embedded default: one process has the database, others
// reach it through that one's socket, and when it dies another takes over.
// Package daemon does it for real; this is the smallest thing that shows the
// rule and its price. docs/design/0002-one-database.md has the figures.

// way is how a process reaches the database at the moment.
type way struct {
	dir, socket string
	db          *DB // if this process has it
	root        *durable.Root
	client      http.Client
}

func newWay(dir string) *way {
	w := &way{dir: dir, socket: filepath.Join(dir, "state.sock")}
	w.client.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", w.socket)
	}}
	return w
}

// open tries to become the owner: the lock on the file decides.
func (w *way) open() error {
	root, err := durable.Create(w.dir, 0o711)
	if err != nil {
		return err
	}
	db, err := Open(root, Options{})
	if err != nil {
		root.Close()
		return err
	}
	// The name may be a dead owner's. Nobody else can be serving: the lock
	// is ours.
	_ = os.Remove(w.socket)
	l, err := net.Listen("unix", w.socket)
	if err != nil {
		return errors.Join(err, db.Close())
	}
	w.root, w.db = root, db
	go http.Serve(l, w)
	return nil
}

// ServeHTTP answers PUT and GET of a lease's name.
func (w *way) ServeHTTP(out http.ResponseWriter, r *http.Request) {
	if err := w.here(r.Context(), r.Method, strings.TrimPrefix(r.URL.Path, "/")); err != nil {
		http.Error(out, err.Error(), http.StatusInternalServerError)
	}
}

func (w *way) here(ctx context.Context, method, key string) error {
	if method == http.MethodPut {
		return w.db.Update(ctx, func(tx *Tx) error {
			return tx.Leases().Put(layout.LeaseID(key), layout.LeaseRecord{Purpose: key})
		})
	}
	return w.db.View(ctx, func(tx *Tx) error {
		_, err := tx.Leases().Get(layout.LeaseID(key))
		return err
	})
}

func (w *way) call(method, key string) error {
	if w.db != nil {
		return w.here(context.Background(), method, key)
	}
	req, err := http.NewRequest(method, "http://varve/"+url.PathEscape(key), nil)
	if err != nil {
		return err
	}
	resp, err := w.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		return errors.New(string(text))
	}
	return nil
}

// insist carries out an idempotent call through whoever has the database, if
// need be by taking it over.
func (w *way) insist(method, key string) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := w.call(method, key)
		if err == nil || w.db != nil || time.Now().After(deadline) {
			return err
		}
		if oerr := w.open(); oerr == nil {
			fmt.Println("owner")
		} else if !errors.Is(oerr, ErrLocked) {
			return oerr
		}
		time.Sleep(time.Millisecond)
	}
}

func init() {
	// share DIR NAME COUNT puts COUNT records and says when each is safe,
	// then stays until its input ends.
	roles["share"] = func(args []string) error {
		w := newWay(args[0])
		var count int
		fmt.Sscan(args[2], &count)
		for i := range count {
			key := fmt.Sprintf("%s-%d", args[1], i)
			if err := w.insist(http.MethodPut, key); err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
			fmt.Println("ack", key)
		}
		fmt.Println("done")
		_, _ = io.Copy(io.Discard, os.Stdin)
		return nil
	}
}

// TestSharedDatabase runs eight processes on one store and kills whoever has
// it, again and again. Everything acknowledged is there in the end.
func TestSharedDatabase(t *testing.T) {
	const processes, each, kills = 8, 150, 4
	dir := t.TempDir()
	s := &sharers{acked: map[string]bool{}}
	for i := range processes {
		s.start(t, dir, fmt.Sprintf("p%d", i), each)
	}
	var gaps []time.Duration
	for range kills {
		if gap, ok := s.killOwner(t, 40); ok {
			gaps = append(gaps, gap.Round(time.Millisecond))
		}
	}
	s.waitDone(t, processes-len(gaps))
	for _, p := range s.procs {
		p.in.Close()
		p.cmd.Wait() // the killed ones fail
	}
	t.Logf("%d acknowledged, owner killed %d times, nobody could write for %v", len(s.acked), len(gaps), gaps)
	if len(gaps) < 2 {
		t.Errorf("only %d owners were killed", len(gaps))
	}
	os.Remove(filepath.Join(dir, "state.sock"))
	db := openDB(t, dir)
	view(t, db, func(tx *Tx) error {
		for key := range s.acked {
			if !tx.Leases().Has(layout.LeaseID(key)) {
				t.Errorf("%s was acknowledged and is not there", key)
			}
		}
		return nil
	})
}

type sharer struct {
	cmd *exec.Cmd
	in  io.Closer
}

// sharers are the processes of the test and what they said.
type sharers struct {
	procs []*sharer
	mu    sync.Mutex
	acked map[string]bool
	owner *sharer
	done  int
}

func (s *sharers) start(t *testing.T, dir, name string, count int) {
	t.Helper()
	p := &sharer{cmd: child(t, "share", dir, name, fmt.Sprint(count))}
	in, err := p.cmd.StdinPipe()
	must(t, err)
	out, err := p.cmd.StdoutPipe()
	must(t, err)
	must(t, p.cmd.Start())
	p.in = in
	s.procs = append(s.procs, p)
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			word, key, _ := strings.Cut(lines.Text(), " ")
			s.mu.Lock()
			switch word {
			case "ack":
				s.acked[key] = true
			case "owner":
				s.owner = p
			case "done":
				s.done++
			}
			s.mu.Unlock()
		}
	}()
}

func (s *sharers) state() (acked, done int, owner *sharer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.acked), s.done, s.owner
}

// killOwner waits for n more records, kills the owner, and returns how long it
// took until another record was safe. It is false when the work was done first.
func (s *sharers) killOwner(t *testing.T, n int) (time.Duration, bool) {
	t.Helper()
	from, _, _ := s.state()
	for {
		acked, done, owner := s.state()
		if done > 0 {
			return 0, false
		}
		if acked >= from+n && owner != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	_, _, owner := s.state()
	must(t, owner.cmd.Process.Kill())
	owner.cmd.Process.Wait()
	start := time.Now()
	from, _, _ = s.state()
	for {
		acked, done, now := s.state()
		if done > 0 || now != owner && acked > from {
			return time.Since(start), true
		}
		if time.Since(start) > 20*time.Second {
			t.Fatal("nobody took over")
		}
		time.Sleep(100 * time.Microsecond)
	}
}

func (s *sharers) waitDone(t *testing.T, n int) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		if _, done, _ := s.state(); done >= n {
			return
		}
		if time.Since(start) > 60*time.Second {
			acked, done, _ := s.state()
			t.Fatalf("%d of %d processes are done, %d acknowledged", done, n, acked)
		}
	}
}

// BenchmarkThroughSocket is the price of being a guest, beside the owner's own
// calls.
func BenchmarkThroughSocket(b *testing.B) {
	owner := newWay(b.TempDir())
	must(b, owner.open())
	defer owner.db.Close()
	guest := newWay(owner.dir)
	must(b, owner.call(http.MethodPut, "key"))
	for _, c := range []struct {
		name string
		way  *way
	}{{"owner", owner}, {"guest", guest}} {
		for _, method := range []string{http.MethodGet, http.MethodPut} {
			b.Run(c.name+"/"+method, func(b *testing.B) {
				for b.Loop() {
					must(b, c.way.call(method, "key"))
				}
			})
		}
	}
}
