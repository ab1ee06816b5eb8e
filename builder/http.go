package builder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/session/upload"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"varve.dev/errdefs"
	"varve.dev/internal/version"
	"varve.dev/layout"
)

// httpOrigin is a file of a web server, or one that the client sends as if it
// were.
type httpOrigin struct {
	j        *job
	v        *vertex
	url      string
	checksum digest.Digest // that it has to have
	filename string
	perm     os.FileMode
	uid, gid int
	header   http.Header
	secret   string // whose value is the Authorization header

	got *fetched
}

// fetched is a file that was downloaded.
type fetched struct {
	path     string // in the builder's scratch directory; empty: it is in the store
	snapshot layout.SnapshotKey
	Filename string
	Digest   digest.Digest
	Modified *time.Time
	ETag     string
}

// clientHost is the host of URLs that the build's client answers.
const clientHost = "buildkit-session"

// headers that a definition may set.
var passedHeaders = []string{"Accept", "User-Agent"}

func newHTTPOrigin(j *job, v *vertex, op *pb.SourceOp) (*httpOrigin, error) {
	o := &httpOrigin{j: j, v: v, url: op.Identifier, perm: 0o600, header: http.Header{}}
	number := func(s string) (int, error) {
		n, err := strconv.ParseInt(s, 0, 32)
		return int(n), err
	}
	for key, value := range op.Attrs {
		var err error
		var n int
		switch key {
		case pb.AttrHTTPChecksum:
			o.checksum, err = digest.Parse(value)
		case pb.AttrHTTPFilename:
			o.filename = value
		case pb.AttrHTTPPerm:
			if n, err = number(value); n != 0 {
				o.perm = os.FileMode(n)
			}
		case pb.AttrHTTPUID:
			o.uid, err = number(value)
		case pb.AttrHTTPGID:
			o.gid, err = number(value)
		case pb.AttrHTTPAuthHeaderSecret:
			o.secret = value
		default:
			if name, ok := strings.CutPrefix(key, pb.AttrHTTPHeaderPrefix); ok {
				if name = http.CanonicalHeaderKey(name); slices.Contains(passedHeaders, name) {
					o.header.Set(name, value)
				}
			}
		}
		if err != nil {
			return nil, fmt.Errorf("source %s: %s %q: %w: %w", op.Identifier, key, value, err, errdefs.ErrInvalidArgument)
		}
	}
	return o, nil
}

// identify: what a checksum names need not be asked for.
func (o *httpOrigin) identify(ctx context.Context) (string, error) {
	if o.checksum != "" {
		return o.key(o.name(nil), o.checksum, nil), nil
	}
	if err := o.fetch(ctx); err != nil {
		return "", err
	}
	return o.key(o.got.Filename, o.got.Digest, o.got.Modified), nil
}

func (o *httpOrigin) key(filename string, d digest.Digest, modified *time.Time) string {
	k := newKeyHash("http")
	at := ""
	if modified != nil {
		at = modified.UTC().Format(http.TimeFormat)
	}
	k.add(filename, d.String(), at, fmt.Sprintf("%o %d %d", o.perm, o.uid, o.gid))
	return k.sum()
}

func (o *httpOrigin) bring(ctx context.Context, key string) (outputs, error) {
	return o.j.b.flights.do(ctx, key, func() (outputs, error) {
		out, ok, err := o.j.lookup(ctx, key)
		if err != nil || ok {
			return out, err
		}
		if err := o.fetch(ctx); err != nil {
			return out, err
		}
		if o.got.snapshot != "" { // its row by content was evicted alone
			return outputs{key: key, snapshots: []layout.SnapshotKey{o.got.snapshot}}, nil
		}
		t := &step{j: o.j, v: o.v, key: key, began: time.Now()}
		if o.got.ETag != "" {
			note, err := json.Marshal(o.got)
			if err != nil {
				return out, fmt.Errorf("source %s: %w: %w", o.redacted(), err, errdefs.ErrInternal)
			}
			t.source, t.note = o.urlKey(), string(note)
		}
		active, tree, err := t.prepare(ctx, "")
		if err != nil {
			return out, err
		}
		if err := o.place(tree.Upper); err != nil {
			t.discard(active)
			return out, err
		}
		return t.commit(ctx, []layout.SnapshotKey{active})
	})
}

// place puts the file into a tree.
func (o *httpOrigin) place(dir string) error {
	name := filepath.Join(dir, o.got.Filename)
	in, err := os.Open(o.got.path)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	at := time.Unix(0, 0)
	if o.got.Modified != nil {
		at = *o.got.Modified
	}
	return errors.Join(err, out.Close(), os.Chown(name, o.uid, o.gid), os.Chmod(name, o.perm&os.ModePerm), os.Chtimes(name, at, at))
}

// urlKey is the key under which the answer to the question is found again.
func (o *httpOrigin) urlKey() string {
	k := newKeyHash("url")
	k.add(o.url, o.filename, fmt.Sprintf("%o %d %d", o.perm, o.uid, o.gid), o.secret, fmt.Sprint(o.header))
	return k.sum()
}

// known is what was downloaded before, if the server says that it is still the
// same.
func (o *httpOrigin) known(ctx context.Context) (*fetched, error) {
	rec, err := o.j.cached(ctx, o.urlKey())
	if err != nil || rec.Note == "" || len(rec.Snapshots) != 1 {
		return nil, err
	}
	var old fetched
	if err := json.Unmarshal([]byte(rec.Note), &old); err != nil || old.ETag == "" {
		return nil, nil
	}
	old.snapshot = rec.Snapshots[0]
	if err := o.j.hold(ctx, rec.Snapshots); err != nil {
		return nil, ignoreNotFound(err)
	}
	resp, err := o.request(ctx, http.MethodHead, old.ETag)
	if err != nil {
		return nil, nil // some servers know no HEAD: it is downloaded
	}
	resp.Body.Close()
	if tag := resp.Header.Get("ETag"); tag == old.ETag || resp.StatusCode == http.StatusNotModified && tag == "" {
		return &old, nil
	}
	return nil, nil
}

// fetch downloads the file, once.
func (o *httpOrigin) fetch(ctx context.Context) (err error) {
	if o.got != nil {
		return nil
	}
	known, err := o.known(ctx)
	if err != nil {
		return err
	}
	if known != nil {
		if err := o.check(known.Digest); err != nil {
			return err
		}
		o.got = known
		return nil
	}
	resp, err := o.request(ctx, http.MethodGet, "")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	f, err := os.CreateTemp(o.j.b.Scratch, "http-")
	if err != nil {
		return fmt.Errorf("download %s: %w: %w", o.redacted(), err, errdefs.ErrUnavailable)
	}
	told := o.j.progress.part(o.v, "downloading "+o.redacted(), "downloading")
	defer told.done()
	sum := digest.Canonical.Digester()
	n, err := io.Copy(io.MultiWriter(f, sum.Hash(), &counter{told: told, total: resp.ContentLength}), resp.Body)
	if err = errors.Join(err, f.Close()); err == nil && resp.ContentLength >= 0 && n != resp.ContentLength {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		err = o.check(sum.Digest())
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("download %s: %w", o.redacted(), err)
	}
	o.j.atEnd(func() { _ = os.Remove(f.Name()) })
	o.got = &fetched{path: f.Name(), Filename: o.name(resp), Digest: sum.Digest(), ETag: resp.Header.Get("ETag")}
	if t, err := http.ParseTime(resp.Header.Get("Last-Modified")); err == nil {
		o.got.Modified = &t
	}
	return nil
}

// check compares a digest with the one that the file has to have.
func (o *httpOrigin) check(d digest.Digest) error {
	if o.checksum == "" || d == o.checksum {
		return nil
	}
	return fmt.Errorf("digest mismatch for %s: %s (expected: %s): %w", o.redacted(), d, o.checksum, errdefs.ErrFailedPrecondition)
}

// counter tells of bytes that pass.
type counter struct {
	told     *part
	n, total int64
}

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	c.told.at(c.n, max(c.total, 0))
	return len(p), nil
}

func (o *httpOrigin) redacted() string {
	if u, err := url.Parse(o.url); err == nil {
		return u.Redacted()
	}
	return o.url
}

// request asks the server, or the client.
func (o *httpOrigin) request(ctx context.Context, method, tag string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, o.url, nil)
	if err != nil {
		return nil, fmt.Errorf("source %s: %w: %w", o.redacted(), err, errdefs.ErrInvalidArgument)
	}
	if req.URL.Host == clientHost {
		return o.fromClient(ctx, req.URL)
	}
	req.Header = o.header.Clone()
	if req.Header.Get("User-Agent") == "" {
		// Servers know BuildKit's, and treat others as browsers.
		req.Header.Set("User-Agent", "buildkit/"+version.BuildKit()+" varve/"+version.Version)
	}
	if tag != "" {
		req.Header.Set("If-None-Match", tag)
		// What Go's client asks for by itself, for GET: tags may differ by it.
		req.Header.Set("Accept-Encoding", "gzip")
	}
	if o.secret != "" {
		value, ok, err := o.j.secretData(ctx, o.secret, false)
		if err != nil {
			return nil, err
		}
		if ok {
			req.Header.Set("Authorization", string(value))
		}
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	if resp.StatusCode != http.StatusOK && (tag == "" || resp.StatusCode != http.StatusNotModified) {
		resp.Body.Close()
		var kind error = errdefs.ErrUnavailable
		if resp.StatusCode == http.StatusNotFound {
			kind = errdefs.ErrNotFound
		}
		return nil, fmt.Errorf("%s: invalid response status %d: %w", o.redacted(), resp.StatusCode, kind)
	}
	return resp, nil
}

func (o *httpOrigin) fromClient(ctx context.Context, u *url.URL) (*http.Response, error) {
	caller, err := o.j.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	up, err := upload.New(ctx, caller, u)
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	go func() {
		_, err := up.WriteTo(w)
		w.CloseWithError(err)
	}()
	return &http.Response{StatusCode: http.StatusOK, Body: r, ContentLength: -1, Header: http.Header{}}, nil
}

// name is what the file is called.
func (o *httpOrigin) name(resp *http.Response) string {
	if o.filename != "" {
		return safeName(o.filename)
	}
	if resp != nil {
		_, params, err := mime.ParseMediaType(resp.Header.Get("Content-Disposition"))
		if name := params["filename"]; err == nil && name != "" && !strings.HasSuffix(name, "/") {
			return safeName(name)
		}
	}
	if u, err := url.Parse(o.url); err == nil {
		return safeName(u.Path)
	}
	return safeName("")
}

// safeName is the last element of a path, which names a file in a directory.
func safeName(p string) string {
	name := path.Base(path.Clean("/" + filepath.ToSlash(p)))
	if name == "/" || name == "." || name == ".." {
		return "download"
	}
	return name
}

// metadata tells what the file is at the moment.
func (o *httpOrigin) metadata(ctx context.Context, opt *sourceresolver.ResolveHTTPOpt) (*sourceresolver.ResolveHTTPResponse, error) {
	if o.checksum != "" && (opt == nil || opt.ChecksumReq == nil) {
		return &sourceresolver.ResolveHTTPResponse{Digest: o.checksum, Filename: o.name(nil)}, nil
	}
	if err := o.fetch(ctx); err != nil {
		return nil, err
	}
	out := &sourceresolver.ResolveHTTPResponse{Digest: o.got.Digest, Filename: o.got.Filename, LastModified: o.got.Modified}
	if opt == nil || opt.ChecksumReq == nil {
		return out, nil
	}
	algo := map[sourceresolver.ResolveHTTPChecksumAlgo]digest.Algorithm{
		sourceresolver.ResolveHTTPChecksumAlgoSHA256: digest.SHA256,
		sourceresolver.ResolveHTTPChecksumAlgoSHA384: digest.SHA384,
		sourceresolver.ResolveHTTPChecksumAlgoSHA512: digest.SHA512,
	}[opt.ChecksumReq.Algo]
	if !algo.Available() {
		return nil, fmt.Errorf("checksum algorithm %v is not known here: %w", opt.ChecksumReq.Algo, errdefs.ErrInvalidArgument)
	}
	f, err := o.open(ctx)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sum := algo.Digester()
	if _, err := io.Copy(sum.Hash(), f); err != nil {
		return nil, err
	}
	sum.Hash().Write(opt.ChecksumReq.Suffix)
	out.ChecksumResponse = &sourceresolver.ResolveHTTPChecksumResponse{Digest: sum.Digest().String(), Suffix: opt.ChecksumReq.Suffix}
	return out, nil
}

// open reads the file, wherever it is.
func (o *httpOrigin) open(ctx context.Context) (*os.File, error) {
	if o.got.snapshot == "" {
		return os.Open(o.got.path)
	}
	layers, err := o.j.b.Snaps.Layers(ctx, o.got.snapshot)
	if err != nil {
		return nil, err
	}
	return os.Open(filepath.Join(layers[0].Dir, o.got.Filename))
}
