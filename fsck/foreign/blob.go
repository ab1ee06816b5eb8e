package foreign

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// readAhead is how much of a blob is read at once.
const readAhead = 128 << 10

// zstdWindow bounds the memory of one zstd stream.
const zstdWindow = 128 << 20

// zstdMagic is four bytes; what is skippable may stand before it, but no
// engine writes that.
var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// layerBlob is what reading a layer's blob showed.
type layerBlob struct {
	sum  digest.Digest // of its bytes
	diff digest.Digest // of its stream, as far as that goes
	err  error         // why it goes no further
}

// hashBlob reads a blob to its end. A nil error means that it was read; what
// is in it is not judged.
func (c *checker) hashBlob(r io.Reader, algorithm digest.Algorithm) (digest.Digest, error) {
	h := algorithm.Hash()
	err := drain(h, watched{c, r})
	return digest.NewDigest(algorithm, h), err
}

// buffers are for drain, which reads many small files.
var buffers = sync.Pool{New: func() any { return new([readAhead]byte) }}

// drain copies what is left of a reader.
func drain(to io.Writer, from io.Reader) error {
	buf := buffers.Get().(*[readAhead]byte)
	defer buffers.Put(buf)
	_, err := io.CopyBuffer(to, from, buf[:])
	return err
}

// readLayer reads a layer's blob to its end, hands its stream, uncompressed,
// to take, and hashes both. An error of take is the result's; one of reading
// the file is returned.
func (c *checker) readLayer(r io.Reader, algorithm, diffs digest.Algorithm, take func(io.Reader) error) (layerBlob, error) {
	file := &noted{r: watched{c, r}}
	blob, diff := algorithm.Hash(), diffs.Hash()
	bytes := io.TeeReader(file, blob)
	out := layerBlob{err: inflate(bytes, diff, take)}
	if err := errors.Join(file.err, drain(discard{}, bytes)); err != nil {
		return out, err
	}
	out.sum, out.diff = digest.NewDigest(algorithm, blob), digest.NewDigest(diffs, diff)
	return out, nil
}

// inflate hands the uncompressed stream to take and hashes all of it.
func inflate(r io.Reader, diff hash.Hash, take func(io.Reader) error) error {
	br := bufio.NewReaderSize(r, readAhead)
	head, err := br.Peek(len(zstdMagic))
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	var stream io.Reader = br
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		z, err := gzip.NewReader(br)
		if err != nil {
			return fmt.Errorf("gzip: %w", err)
		}
		stream = z
	case bytes.Equal(head, zstdMagic):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return fmt.Errorf("zstd: %w", err)
		}
		defer z.Close()
		stream = z
	}
	stream = io.TeeReader(stream, diff)
	if err := take(stream); err != nil {
		return err
	}
	return drain(discard{}, stream)
}

// discard is io.Discard without its own, smaller buffer.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// ignored is a take for a stream that is only hashed.
func ignored(io.Reader) error { return nil }

// noted keeps the error of a file apart from those of what reads it.
type noted struct {
	r   io.Reader
	err error
}

func (n *noted) Read(p []byte) (int, error) {
	k, err := n.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		n.err = err
	}
	return k, err
}
