package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/session/sshforward"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/entitlements"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"

	"varve.dev/errdefs"
	"varve.dev/runtime"
)

// entitled refuses what the client, or the configuration, does not grant.
func (j *job) entitled(op *pb.ExecOp) error {
	for _, need := range []struct {
		is   bool
		what entitlements.Entitlement
	}{
		{op.Network == pb.NetMode_HOST, entitlements.EntitlementNetworkHost},
		{op.Security == pb.SecurityMode_INSECURE, entitlements.EntitlementSecurityInsecure},
	} {
		if need.is && !slices.Contains(j.granted, need.what.String()) {
			return fmt.Errorf("entitlement %s is not allowed: %w", need.what, errdefs.ErrPermissionDenied)
		}
	}
	return nil
}

// secretData asks the client for a secret; ok is false for one that it has not
// and that need not be.
func (j *job) secretData(ctx context.Context, id string, optional bool) (data []byte, ok bool, err error) {
	caller, err := j.caller(ctx, "")
	if err == nil {
		data, err = secrets.GetSecret(ctx, caller, id)
	}
	if err == nil {
		return data, true, nil
	}
	missing := errors.Is(err, secrets.ErrNotFound) || errors.Is(err, errdefs.ErrNotFound)
	if missing && optional {
		return nil, false, nil
	}
	if missing {
		err = &kindError{fmt.Errorf("secret %s: %w", id, secrets.ErrNotFound), errdefs.ErrNotFound}
	}
	return nil, false, err
}

// secret mounts a file with a secret. It is in memory for as long as the step
// runs.
func (e *execution) secret(ctx context.Context, m *pb.Mount) error {
	o := m.SecretOpt
	data, ok, err := e.j.secretData(ctx, o.GetID(), o.GetOptional())
	if err != nil || !ok {
		return err
	}
	e.spec.Mounts = append(e.spec.Mounts, runtime.Mount{
		Type: "secret", Target: m.Dest, ReadOnly: true,
		Secret: &runtime.Secret{Data: data, UID: int(o.GetUid()), GID: int(o.GetGid()), Mode: o.GetMode() & 0o777},
	})
	return nil
}

// secretEnv puts secrets into the environment. One that is not there, and need
// not be, is empty.
func (e *execution) secretEnv(ctx context.Context, list []*pb.SecretEnv) error {
	for _, s := range list {
		id := s.ID
		if id == "" {
			return fmt.Errorf("secret ID missing for %q environment variable: %w", s.Name, errdefs.ErrInvalidArgument)
		}
		data, _, err := e.j.secretData(ctx, id, s.Optional)
		if err != nil {
			return err
		}
		e.spec.Env = append(e.spec.Env, s.Name+"="+string(data))
	}
	return nil
}

// agent mounts a socket that reaches an ssh agent of the client.
func (e *execution) agent(ctx context.Context, m *pb.Mount) error {
	o := m.SSHOpt
	socket, closeSocket, err := e.j.agentSocket(ctx, sshforward.SocketOpt{
		ID: o.GetID(), UID: int(o.GetUid()), GID: int(o.GetGid()), Mode: int(o.GetMode() & 0o777),
	})
	if err != nil {
		if o.GetOptional() && !errors.Is(err, errdefs.ErrUnavailable) {
			return nil
		}
		return err
	}
	e.unlock = append(e.unlock, closeSocket)
	e.spec.Mounts = append(e.spec.Mounts, runtime.Mount{Type: "bind", Source: socket, Target: m.Dest})
	return nil
}

// agentSocket makes a socket that reaches an ssh agent of the client, until it
// is closed. Errors: ErrNotFound if the client has no such agent; ErrUnavailable
// if it has, and the socket can not be made.
func (j *job) agentSocket(ctx context.Context, opt sshforward.SocketOpt) (socket string, end func(), err error) {
	caller, err := j.caller(ctx, "")
	if err == nil {
		err = sshforward.CheckSSHID(ctx, caller, opt.ID)
	}
	if err != nil {
		if errors.Is(err, errdefs.ErrNotFound) || grpcerrors.Code(err) == codes.Unimplemented {
			err = fmt.Errorf("no SSH key %q forwarded from the client: %w", opt.ID, errdefs.ErrNotFound)
		}
		return "", nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	socket, closeSocket, err := sshforward.MountSSHSocket(ctx, caller, opt)
	if err != nil {
		cancel()
		return "", nil, fmt.Errorf("socket for SSH key %q: %w: %w", opt.ID, err, errdefs.ErrUnavailable)
	}
	return socket, func() {
		_ = closeSocket()
		cancel()
		_ = os.Remove(filepath.Dir(socket))
	}, nil
}
