package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
)

// enoughProgress is what a connection has to bring for the count of attempts
// to begin anew: a server that closes after every few bytes is given up.
const enoughProgress = 64 << 10

// Open returns the blob's bytes from offset to its end, as one stream: when
// the connection breaks or falls silent, it is taken up again with a Range
// request where it was; a server that ignores Range is read from the start and
// what is known already skipped. Whether the bytes are the right ones is for
// the reader to check.
//
// Read returns io.EOF after exactly desc.Size bytes. It fails for good when
// the patience is at its end, and at once when asking again cannot help. The
// error names the blob and the repository and is of kind ErrUnavailable,
// ErrNotFound, ErrPermissionDenied, or ErrFailedPrecondition for a blob of
// another size. The stream ends with ctx; the caller closes it.
func (r *Repository) Open(ctx context.Context, desc ocispec.Descriptor, offset int64) io.ReadCloser {
	return &stream{
		ctx: quiet(ctx), desc: desc, at: offset, progress: time.Now(), patience: r.patience,
		what: fmt.Sprintf("blob %s of %s", desc.Digest, r.name),
		open: func(ctx context.Context, at int64) (io.ReadCloser, error) { return r.openAt(ctx, desc, at) },
	}
}

// openAt makes one request. containerd's reader sends it with the first Read.
func (r *Repository) openAt(ctx context.Context, desc ocispec.Descriptor, at int64) (io.ReadCloser, error) {
	// URLs in a manifest lead wherever its author liked, past the guard and
	// the hosts configuration.
	desc.URLs = nil
	body, err := r.fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	if at == 0 {
		return body, nil
	}
	seeker, ok := body.(io.Seeker)
	if !ok {
		body.Close()
		return nil, fmt.Errorf("cannot be read from the middle: %w", errdefs.ErrNotImplemented)
	}
	if _, err := seeker.Seek(at, io.SeekStart); err != nil {
		body.Close()
		return nil, err
	}
	return body, nil
}

type stream struct {
	ctx      context.Context
	desc     ocispec.Descriptor
	what     string
	patience Patience
	open     func(ctx context.Context, at int64) (io.ReadCloser, error)

	body     io.ReadCloser
	at       int64     // of the next byte
	failures int       // since enough progress was made
	marked   int64     // at, when failures was last set to 0
	progress time.Time // of the last byte
}

func (s *stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if s.at >= s.desc.Size {
			return 0, s.atEnd()
		}
		n, err := s.step(p)
		if n > 0 {
			s.advance(n)
			if err != nil {
				s.drop() // the next Read takes it up again
			}
			return n, nil
		}
		if err == nil {
			continue
		}
		s.drop()
		if err := s.again(err); err != nil {
			return 0, err
		}
	}
}

// step reads once from the connection, which it makes if there is none.
func (s *stream) step(p []byte) (int, error) {
	if s.body == nil {
		body, err := s.open(s.ctx, s.at)
		if err != nil {
			return 0, err
		}
		s.body = body
	}
	if left := s.desc.Size - s.at; int64(len(p)) > left {
		p = p[:left]
	}
	n, err := s.body.Read(p)
	if err == io.EOF && s.at+int64(n) < s.desc.Size {
		err = errEndedEarly
	}
	return n, err
}

var errEndedEarly = errors.New("ended early")

func (s *stream) advance(n int) {
	s.at += int64(n)
	s.progress = time.Now()
	if s.at-s.marked >= enoughProgress {
		s.marked, s.failures = s.at, 0
	}
}

// atEnd makes sure that the server has nothing more: a blob that is longer
// than announced is as wrong as a short one. What containerd's reader says of
// that is all there is to look at; a connection that breaks now is no loss.
func (s *stream) atEnd() error {
	if s.body == nil {
		return io.EOF
	}
	var one [1]byte
	n, _ := s.body.Read(one[:])
	s.drop()
	if n > 0 {
		return fmt.Errorf("%s is longer than the %d bytes announced: %w", s.what, s.desc.Size, errdefs.ErrFailedPrecondition)
	}
	return io.EOF
}

// again returns nil when the next attempt is due, or the error that ends the
// stream.
func (s *stream) again(err error) error {
	if ctxErr := s.ctx.Err(); ctxErr != nil {
		return ctxErr
	}
	s.failures++
	short := errors.Is(err, errEndedEarly)
	switch {
	case errors.Is(err, errdefs.ErrNotFound):
		return fmt.Errorf("%s is not there: %w", s.what, errdefs.ErrNotFound)
	case !short:
		err = remoteError(s.what, err)
	}
	if short && s.failures >= min(3, s.patience.Attempts) {
		return fmt.Errorf("%s ends after %d bytes, %d were announced: %w", s.what, s.at, s.desc.Size, errdefs.ErrFailedPrecondition)
	}
	if final(err) {
		return err
	}
	pause := s.patience.wait(s.failures)
	if s.failures >= s.patience.Attempts || time.Since(s.progress)+pause > s.patience.Total {
		return fmt.Errorf("%w (at byte %d of %d, attempts: %d)", err, s.at, s.desc.Size, s.failures)
	}
	return sleep(s.ctx, pause)
}

func (s *stream) drop() {
	if s.body != nil {
		s.body.Close()
		s.body = nil
	}
}

func (s *stream) Close() error {
	s.drop()
	return nil
}
