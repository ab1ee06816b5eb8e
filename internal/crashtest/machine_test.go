package crashtest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"varve.dev/daemon"
	"varve.dev/internal/testkit"
)

// machine is a place with varve's own binaries on it, whose store lives on
// from case to case.
type machine struct {
	place
	dir      string // everything of it
	bin      string
	root     string
	config   string
	lane     int // its number: what it pushes has names of its own
	random   *rand.Rand
	supplies *supplies
	usual    map[string]time.Duration // how long a command of a kind takes
	told     told
	builds   [clients]built
	names    int // containers named so far
	age      int // cases that the store has seen; 0: a new one is wanted
	cgroups  map[string]bool
}

// patience is how long anything may take before it counts as hung.
const patience = 60 * time.Second

// newMachine makes a machine without a store. It has names of its own for the
// binaries: a process on it is told from others by what it runs.
func newMachine(t *testing.T, s *supplies, lane int, usual map[string]time.Duration) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{
		place: s.place, dir: dir, bin: filepath.Join(dir, "bin"), config: filepath.Join(dir, "config.toml"),
		lane: lane, random: rand.New(rand.NewPCG(seed(t), uint64(lane))), supplies: s, usual: usual,
	}
	m.shim = filepath.Join(m.bin, "varve-runtime")
	must(t, os.Mkdir(m.bin, 0o755))
	for _, name := range []string{"varve", "varve-runtime"} {
		must(t, os.Link(filepath.Join(testkit.Binaries(t), name), filepath.Join(m.bin, name)))
	}
	must(t, os.WriteFile(m.config, fmt.Appendf(nil, "[registry]\nplain_http = [%q]\n", m.remote), 0o600))
	m.newStore(t)
	return m
}

// newStore puts an empty place where the store was.
func (m *machine) newStore(t *testing.T) {
	t.Helper()
	if m.root != "" {
		must(t, errors.Join(os.RemoveAll(m.root), os.RemoveAll(m.state)))
	}
	m.root, m.state = filepath.Join(m.dir, "root"), filepath.Join(m.dir, "state")
	m.told, m.builds, m.cgroups = newTold(), [clients]built{}, map[string]bool{}
}

// running is a command under way.
type running struct {
	order
	cmd    *exec.Cmd
	out    string // the file with what it printed
	began  time.Time
	took   time.Duration
	ended  chan struct{} // closed when it has
	victim bool
}

// start starts a command. It writes into a file: a pipe would be held open by
// a shim that lives on.
func (m *machine) start(o order) (*running, error) {
	out, err := os.CreateTemp(m.dir, "out-")
	if err != nil {
		return nil, err
	}
	defer out.Close()
	r := &running{order: o, out: out.Name(), began: time.Now(), ended: make(chan struct{})}
	r.cmd = exec.Command(filepath.Join(m.bin, "varve"), append([]string{"--config", m.config}, o.args...)...)
	r.cmd.Env = append(os.Environ(), "VARVE_ROOT="+m.root, "VARVE_STATE="+m.state, "DOCKER_CONFIG="+m.dir)
	r.cmd.Stdout, r.cmd.Stderr = out, out
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = r.cmd.Wait()
		r.took = time.Since(r.began)
		close(r.ended)
	}()
	return r, nil
}

// over tells whether the command has ended by now.
func (r *running) over() bool {
	select {
	case <-r.ended:
		return true
	default:
		return false
	}
}

// kill kills the command, and nothing that it has started.
func (m *machine) kill(r *running) {
	m.noteCgroups()
	r.victim = true
	_ = r.cmd.Process.Kill()
	<-r.ended
}

// wait returns when the command has ended. One that hangs tells where.
func (r *running) wait() error {
	select {
	case <-r.ended:
		return nil
	case <-time.After(patience):
		_ = r.cmd.Process.Signal(syscall.SIGQUIT)
		<-r.ended
		return fmt.Errorf("%s hangs: %s", r.order, r.printed(1<<20))
	}
}

// killed tells whether it ended by our kill, and not before.
func (r *running) killed() bool { return r.victim && r.code() == -1 }

func (r *running) code() int { return r.cmd.ProcessState.ExitCode() }

// printed is the end of what the command wrote.
func (r *running) printed(most int) string {
	data, err := os.ReadFile(r.out)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(data[max(0, len(data)-most):]))
}

// crashed tells whether the command, or a call that it served, panicked.
func (r *running) crashed() error {
	if out := r.printed(1 << 20); strings.Contains(out, "\ngoroutine ") {
		return fmt.Errorf("%s crashed: %s", r.order, out)
	}
	return nil
}

// aPage is the most that a message quotes of a command's output.
const aPage = 4000

// run runs a command to its end.
func (m *machine) run(o order) (*running, error) {
	r, err := m.start(o)
	if err != nil {
		return nil, err
	}
	return r, r.wait()
}

// ask runs a command that has to succeed and returns what it printed.
func (m *machine) ask(args ...string) (string, error) {
	r, err := m.run(order{kind: args[0], args: args})
	if err != nil {
		return "", err
	}
	defer os.Remove(r.out)
	if r.code() != 0 {
		return "", fmt.Errorf("varve %s: exit code %d: %s", strings.Join(args, " "), r.code(), r.printed(aPage))
	}
	return r.printed(1 << 20), nil
}

// startDaemon starts a daemon and returns when it answers.
func (m *machine) startDaemon() (*running, error) {
	d, err := m.start(order{kind: "daemon", args: []string{"daemon"}})
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		if conn, err := net.Dial("unix", filepath.Join(m.state, daemon.DaemonSocket)); err == nil {
			return d, conn.Close()
		}
		if d.over() || time.Now().After(deadline) {
			return nil, fmt.Errorf("the daemon does not answer: %s", d.printed(aPage))
		}
	}
}

// endDaemon ends the daemon as a service manager does.
func (d *running) endDaemon() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if err := d.wait(); err != nil {
		return err
	}
	if d.code() != 0 {
		return fmt.Errorf("the daemon ends with %d: %s", d.code(), d.printed(aPage))
	}
	return d.crashed()
}

// someone is one of the commands that are under way, or any.
func (m *machine) someone(list []*running) *running {
	under := slices.DeleteFunc(slices.Clone(list), (*running).over)
	if len(under) == 0 {
		under = list
	}
	return under[m.random.IntN(len(under))]
}
