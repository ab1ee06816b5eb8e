package foreign

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"hash"
	"hash/crc64"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
)

// reassembly puts a layer's stream together from its tar-split record and its
// tree. A file that is not what it was is noted and takes its place in the
// stream with as many bytes as it must have, so that what comes behind it is
// read too.
type reassembly struct {
	c       *checker
	root    *os.File
	entries storage.Unpacker
	entry   *storage.Entry      // the one whose file is asked for next
	wrong   map[string]mismatch // by entry, what is wrong with its file
	// sparse says that the layer has a file in a sparse format. tar-split
	// records such a file without its holes' places, so that no stream comes
	// of it: dockerd does not save or push the layer either.
	sparse bool
}

// maxFile is more than file systems let a file have.
const maxFile = 1 << 44

// mismatch is what is wrong with a file, and the sum that it must have.
type mismatch struct {
	damage
	crc []byte
}

// run returns the tree that the stream makes, nil if it makes none, and its
// digest. An error is one of the record, which then ends early.
func (r *reassembly) run(record io.Reader) (*node, digest.Digest, error) {
	z, err := gzip.NewReader(record)
	if errors.Is(err, io.EOF) {
		err = errEmpty
	}
	if err != nil {
		return nil, "", err
	}
	r.entries = storage.NewJSONUnpacker(z)
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pw.CloseWithError(asm.WriteOutputTarStream(r, r, pw))
	}()
	defer func() {
		pr.Close() // which ends the writer
		<-done
	}()
	sum := digest.SHA256.Hash()
	stream := io.TeeReader(pr, sum)
	want, err := expect(stream, false)
	if err != nil {
		want = nil // the files are compared all the same
	}
	if _, err := io.Copy(io.Discard, stream); err != nil {
		return nil, "", err
	}
	return want, digest.NewDigest(digest.SHA256, sum), nil
}

// Next is storage.Unpacker's.
func (r *reassembly) Next() (*storage.Entry, error) {
	if err := r.c.ctx.Err(); err != nil {
		return nil, err
	}
	e, err := r.entries.Next()
	if err == nil && e.Type == storage.FileType {
		r.entry = e
	} else if err == nil {
		r.sparse = r.sparse || bytes.Contains(e.Payload, []byte("GNU.sparse."))
	}
	return e, err
}

// Get is storage.FileGetter's: the contents of the entry that Next returned.
func (r *reassembly) Get(name string) (io.ReadCloser, error) {
	if r.entry == nil || r.entry.Size < 0 || r.entry.Size > maxFile {
		return nil, fmt.Errorf("%q has no size that a file has", name)
	}
	p := &payload{r: r, entry: r.entry, left: r.entry.Size, sum: crc64.New(storage.CRCTable)}
	f, err := r.open(name)
	if err != nil {
		p.ends(Missing, "it cannot be opened: "+err.Error())
		return p, nil
	}
	p.file = f
	if fi, err := f.Stat(); err == nil {
		if kind, detail := sizeKind(fi.Size(), p.left); kind != "" {
			p.ends(kind, detail)
		}
	}
	return p, nil
}

// open opens a file of the tree as one who unpacked it did: links in its path
// are followed with the tree as their root.
func (r *reassembly) open(name string) (*os.File, error) {
	handle, err := pathrs.OpenatInRoot(r.root, name)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	if fi, err := handle.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(err, fs.ErrInvalid)
	}
	f, err := pathrs.Reopen(handle, unix.O_RDONLY|unix.O_NOATIME)
	if errors.Is(err, unix.EPERM) { // O_NOATIME is for the file's owner
		f, err = pathrs.Reopen(handle, unix.O_RDONLY)
	}
	return f, err
}

// payload is a file as it is in the stream: as long as it must be.
type payload struct {
	r     *reassembly
	entry *storage.Entry
	file  *os.File
	left  int64 // of the size that it must have
	wrong damage
	sum   hash.Hash
}

// ends notes what is wrong with the file. What comes of it are zeros.
func (p *payload) ends(kind Kind, detail string) { p.wrong = damage{kind: kind, detail: detail} }

func (p *payload) Read(buf []byte) (int, error) {
	if p.left == 0 {
		p.judge()
		return 0, io.EOF
	}
	buf = buf[:min(int64(len(buf)), p.left)]
	if p.wrong.kind == "" {
		n, err := watched{p.r.c, p.file}.Read(buf)
		if cerr := p.r.c.ctx.Err(); cerr != nil {
			return 0, cerr
		}
		if err != nil {
			p.ends(Altered, err.Error())
		}
		buf = buf[:n]
	} else {
		clear(buf)
	}
	p.left -= int64(len(buf))
	p.sum.Write(buf)
	return len(buf), nil
}

// judge compares what was read with the record, and lets the library go on:
// it ends at the first file whose sum is another, which would leave the rest
// unread.
func (p *payload) judge() {
	sum := p.sum.Sum(nil)
	if p.wrong.kind == "" && !bytes.Equal(sum, p.entry.Payload) {
		p.ends(Altered, fmt.Sprintf("its bytes have the CRC-64 %x, must have %x", sum, p.entry.Payload))
	}
	if p.wrong.kind != "" {
		p.r.wrong[strings.TrimPrefix(path.Clean("/"+p.entry.GetName()), "/")] = mismatch{p.wrong, p.entry.Payload}
	}
	p.entry.Payload = sum
}

func (p *payload) Close() error {
	if p.file != nil {
		p.file.Close()
	}
	return nil
}

// contents is a comparison's: what Get has seen. A file that was not at the
// entry's name is looked at under the name of its that is there.
func (r *reassembly) contents(e *expected, dirfd int, base string) (string, error) {
	m, ok := r.wrong[e.entry]
	if !ok || m.kind != Missing {
		return m.detail, nil
	}
	f, err := reach.Regular(dirfd, base)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := crc64.New(storage.CRCTable)
	if _, err := io.Copy(sum, watched{r.c, f}); err != nil || bytes.Equal(sum.Sum(nil), m.crc) {
		return "", err
	}
	return fmt.Sprintf("its bytes have the CRC-64 %x, must have %x", sum.Sum(nil), m.crc), nil
}
