package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/overlay"
	"varve.dev/runtime"
)

// step is one operation being carried out.
type step struct {
	j       *job
	v       *vertex
	key     string // definition key
	content string // content key, or ""
	inputs  []layout.SnapshotKey
	began   time.Time
	// Of a source: a key that its result is found by next time, and what is
	// noted with it.
	source, note string
}

// prepare makes a writable snapshot on an input. It goes with the build's
// lease if it is not committed.
func (t *step) prepare(ctx context.Context, on layout.SnapshotKey) (layout.SnapshotKey, overlay.Tree, error) {
	key := layout.SnapshotKey("step:" + layout.NewID())
	if err := t.j.b.Snaps.PrepareFor(ctx, t.j.lease.Node(), key, on); err != nil {
		return "", overlay.Tree{}, err
	}
	tree, err := t.j.b.Snaps.Tree(ctx, key)
	return key, tree, err
}

// discard removes a writable snapshot that came to nothing.
func (t *step) discard(active layout.SnapshotKey) {
	_ = t.j.b.Snaps.RemoveFor(context.Background(), t.j.lease.Node(), active)
}

// commit makes the writable snapshots the outputs of the step and stores the
// result in the cache; the last of them in one publication with the records.
func (t *step) commit(ctx context.Context, actives []layout.SnapshotKey) (outputs, error) {
	out := outputs{key: t.key}
	if t.content != "" {
		out.key = t.content
	}
	for range actives {
		out.snapshots = append(out.snapshots, layout.SnapshotKey("build:"+layout.NewID()))
	}
	for i, active := range actives {
		var extend func(*layout.IntentRecord)
		if i == len(actives)-1 {
			extend = func(in *layout.IntentRecord) { in.Cache = t.records(out) }
		}
		if err := t.j.b.Snaps.CommitFor(ctx, t.j.lease.Node(), out.snapshots[i], active, extend); err != nil {
			return outputs{}, err
		}
	}
	// A cache that does not get smaller is no failure of the step.
	_ = t.j.b.Space.TrimCache(ctx)
	return out, nil
}

// records are the step's rows in the cache.
func (t *step) records(out outputs) []layout.CacheMake {
	now := time.Now().UTC()
	makes := []layout.CacheMake{{Key: out.key, Record: layout.CacheRecord{
		Snapshots: out.snapshots, Created: now, LastUse: now, Took: now.Sub(t.began), Description: t.v.name(),
	}}}
	if t.source != "" {
		makes = append(makes, layout.CacheMake{Key: t.source, Record: layout.CacheRecord{
			Snapshots: out.snapshots, Created: now, LastUse: now, Description: t.v.name(), Note: t.note,
		}})
	}
	if out.key != t.key {
		makes = append(makes, layout.CacheMake{Key: t.key, Record: layout.CacheRecord{
			Alias: out.key, Created: now, LastUse: now, Description: t.v.name(),
		}})
	}
	return makes
}

// exec runs a command.
func (t *step) exec(ctx context.Context, op *pb.ExecOp) (out outputs, err error) {
	if err := t.j.entitled(op); err != nil {
		return out, err
	}
	e := &execution{step: t, op: op, byOutput: map[int64]layout.SnapshotKey{}}
	defer func() { e.end(err) }()
	if err := e.mounts(ctx); err != nil {
		return out, err
	}
	if err := e.run(ctx); err != nil {
		return out, err
	}
	actives := make([]layout.SnapshotKey, len(e.byOutput))
	for i := range actives {
		active, ok := e.byOutput[int64(i)]
		if !ok {
			return out, fmt.Errorf("the step has no output %d: %w", i, errdefs.ErrInvalidArgument)
		}
		actives[i] = active
	}
	return t.commit(ctx, actives)
}

// execution is a command with its mounts.
type execution struct {
	*step
	op       *pb.ExecOp
	spec     runtime.Spec
	actives  []layout.SnapshotKey
	byOutput map[int64]layout.SnapshotKey
	unlock   []func()
	scratch  []string
}

// end lets go of everything. After an error what was written goes too.
func (e *execution) end(err error) {
	for _, f := range e.unlock {
		f()
	}
	for _, dir := range e.scratch {
		_ = os.RemoveAll(dir)
	}
	for _, active := range e.actives {
		kept := false
		for _, out := range e.byOutput {
			kept = kept || out == active
		}
		if err != nil || !kept {
			e.discard(active)
		}
	}
}

// mounts prepares all mounts, parents before what lies in them.
func (e *execution) mounts(ctx context.Context) error {
	list := slices.Clone(e.op.Mounts)
	slices.SortStableFunc(list, func(a, b *pb.Mount) int { return len(path.Clean(a.Dest)) - len(path.Clean(b.Dest)) })
	for _, m := range list {
		var err error
		switch m.MountType {
		case pb.MountType_BIND:
			err = e.bind(ctx, m)
		case pb.MountType_CACHE:
			err = e.cache(ctx, m)
		case pb.MountType_TMPFS:
			options := []string{}
			if size := m.TmpfsOpt.GetSize(); size > 0 {
				options = append(options, fmt.Sprintf("size=%d", size))
			}
			e.spec.Mounts = append(e.spec.Mounts, runtime.Mount{Type: "tmpfs", Source: "tmpfs", Target: m.Dest, Options: options})
		case pb.MountType_SECRET:
			err = e.secret(ctx, m)
		case pb.MountType_SSH:
			err = e.agent(ctx, m)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (e *execution) input(m *pb.Mount) (layout.SnapshotKey, error) {
	if m.Input < 0 {
		return "", nil
	}
	if int(m.Input) >= len(e.inputs) {
		return "", fmt.Errorf("mount %s has no input %d: %w", m.Dest, m.Input, errdefs.ErrInvalidArgument)
	}
	return e.inputs[m.Input], nil
}

// bind mounts an input: for writing on a layer of its own, which is an output
// or is thrown away.
func (e *execution) bind(ctx context.Context, m *pb.Mount) error {
	on, err := e.input(m)
	if err != nil {
		return err
	}
	var tree overlay.Tree
	if m.Readonly && on != "" {
		tree, err = e.j.b.Snaps.Tree(ctx, on)
	} else {
		var active layout.SnapshotKey
		active, tree, err = e.prepare(ctx, on)
		if err == nil {
			e.actives = append(e.actives, active)
			if m.Output >= 0 && !m.Readonly {
				e.byOutput[m.Output] = active
			}
		}
	}
	if err != nil {
		return err
	}
	if path.Clean(m.Dest) == "/" {
		e.spec.Rootfs = tree
		e.spec.ReadOnly = m.Readonly
		return nil
	}
	e.spec.Mounts = append(e.spec.Mounts, runtime.Mount{
		Type: "overlay", Overlay: &tree, Source: "/" + m.Selector, Target: m.Dest, ReadOnly: m.Readonly,
	})
	return nil
}

// run starts the command and waits for it.
func (e *execution) run(ctx context.Context) error {
	meta := e.op.Meta
	if meta == nil {
		return fmt.Errorf("the step has no command: %w", errdefs.ErrInvalidArgument)
	}
	e.spec.ID = "build-" + layout.NewID()
	e.spec.Args, e.spec.Env, e.spec.Cwd, e.spec.User = meta.Args, slices.Clone(meta.Env), meta.Cwd, meta.User
	e.spec.Hostname = meta.Hostname
	if e.spec.Hostname == "" {
		e.spec.Hostname = "buildkitsandbox" // what Dockerfiles see everywhere else
	}
	e.proxies(meta.ProxyEnv)
	if err := e.network(meta); err != nil {
		return err
	}
	x, err := e.j.b.executor()
	if err != nil {
		return err
	}
	if err := e.secretEnv(ctx, e.op.Secretenv); err != nil {
		return err
	}
	if err := e.devices(e.op.CdiDevices); err != nil {
		return err
	}
	e.limits(meta)
	e.spec.Privileged = e.op.Security == pb.SecurityMode_INSECURE
	exit, err := x.Run(ctx, e.spec, runtime.Streams{Out: &logWriter{e, 1}, Err: &logWriter{e, 2}})
	if err != nil {
		return err
	}
	if exit.Error != "" {
		return e.failed(fmt.Errorf("%s: %w", exit.Error, errdefs.ErrFailedPrecondition))
	}
	if !validExit(meta.ValidExitCodes, exit.Code) {
		if exit.OOMKilled {
			return e.failed(fmt.Errorf("killed for want of memory: %w", &gwpb.ExitError{ExitCode: uint32(exit.Code)}))
		}
		return e.failed(&gwpb.ExitError{ExitCode: uint32(exit.Code)})
	}
	return nil
}

// limits are what the frontend asks for, of the kernel and of the cgroup.
func (e *execution) limits(meta *pb.Meta) {
	for _, l := range meta.Ulimit {
		e.spec.Rlimits = append(e.spec.Rlimits, runtime.Rlimit{Name: l.Name, Soft: uint64(l.Soft), Hard: uint64(l.Hard)})
	}
	e.spec.CgroupParent = meta.CgroupParent
	if r := e.v.meta.GetLinuxResources(); r != nil {
		e.spec.Memory, e.spec.MemorySwap = r.Memory, r.MemorySwap
		e.spec.CPUShares, e.spec.CPUPeriod, e.spec.CPUQuota = r.CpuShares, r.CpuPeriod, r.CpuQuota
		e.spec.CPUSetCPUs, e.spec.CPUSetMems = r.CpusetCpus, r.CpusetMems
	}
}

func (e *execution) failed(err error) error {
	return &kindError{fmt.Errorf("process %q did not complete successfully: %w", strings.Join(e.op.Meta.Args, " "), err), errdefs.ErrFailedPrecondition}
}

// validExit: nothing but 0, where nothing is said.
func validExit(valid []int32, code int) bool {
	if len(valid) == 0 {
		return code == 0
	}
	return slices.Contains(valid, int32(code))
}

func (e *execution) proxies(p *pb.ProxyEnv) {
	if p == nil {
		return
	}
	for name, value := range map[string]string{
		"HTTP_PROXY": p.HttpProxy, "HTTPS_PROXY": p.HttpsProxy, "FTP_PROXY": p.FtpProxy, "NO_PROXY": p.NoProxy, "ALL_PROXY": p.AllProxy,
	} {
		if value != "" {
			e.spec.Env = append(e.spec.Env, name+"="+value, strings.ToLower(name)+"="+value)
		}
	}
}

// network gives the step the network that its operation asks for.
func (e *execution) network(meta *pb.Meta) error {
	hosts := meta.ExtraHosts
	if meta.Hostname != "" {
		hosts = append(slices.Clone(hosts), &pb.HostIP{IP: "127.0.0.1", Host: meta.Hostname})
	}
	return e.connect(e.op.Network == pb.NetMode_NONE, hosts)
}

// connect gives the step the host's network, with the host's names and extra
// ones, or none.
func (e *execution) connect(offline bool, extraHosts []*pb.HostIP) error {
	e.spec.Network = runtime.HostNetwork
	if offline {
		e.spec.Network = runtime.NoNetwork
	}
	dir, err := os.MkdirTemp(e.j.b.Scratch, "etc-")
	if err != nil {
		return fmt.Errorf("step: %w: %w", err, errdefs.ErrUnavailable)
	}
	e.scratch = append(e.scratch, dir)
	extra := ""
	for _, h := range extraHosts {
		extra += h.IP + "\t" + h.Host + "\n"
	}
	for name, more := range map[string]string{"resolv.conf": "", "hosts": extra} {
		data, err := os.ReadFile("/etc/" + name)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("step: %w: %w", err, errdefs.ErrUnavailable)
		}
		if len(data) > 0 && more != "" && data[len(data)-1] != '\n' {
			data = append(data, '\n')
		}
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, append(data, more...), 0o644); err != nil {
			return fmt.Errorf("step: %w: %w", err, errdefs.ErrUnavailable)
		}
		e.spec.Mounts = append(e.spec.Mounts, runtime.Mount{Type: "bind", Source: file, Target: "/etc/" + name, ReadOnly: true})
	}
	return nil
}

// logWriter passes a stream of output on.
type logWriter struct {
	e      *execution
	stream int
}

func (w *logWriter) Write(p []byte) (int, error) {
	w.e.j.progress.log(w.e.v, w.stream, slices.Clone(p))
	return len(p), nil
}
