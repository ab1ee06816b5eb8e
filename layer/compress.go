package layer

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"varve.dev/errdefs"
)

// Compression is how a layer's stream is stored.
type Compression string

// The compressions of the OCI image-spec (media types tar, tar+gzip,
// tar+zstd).
const (
	Uncompressed Compression = ""
	Gzip         Compression = "gzip"
	Zstd         Compression = "zstd"
)

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// readAhead is how much of the compressed stream is read at once.
const readAhead = 128 << 10

// zstdWindow bounds the memory of one zstd stream. Encoders stay within 8 MiB
// unless told otherwise (RFC 8878, section 3.1.1.1.2).
const zstdWindow = 64 << 20

var gzipReaders sync.Pool

// Decompress returns the stream behind r, however it is compressed: the bytes
// decide, not the media type, which is often wrong. Close frees what it holds,
// not r.
//
// A damaged or cut stream is an error of kind ErrInvalidArgument, when it is
// read.
func Decompress(r io.Reader) (io.ReadCloser, Compression, error) {
	br := bufio.NewReaderSize(r, readAhead)
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, "", err
	}
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		z, ok := gzipReaders.Get().(*gzip.Reader)
		if !ok {
			z = new(gzip.Reader)
		}
		if err := z.Reset(br); err != nil {
			return nil, Gzip, damaged("gzip", err)
		}
		return &unpacker{read: z.Read, format: "gzip", free: func() { gzipReaders.Put(z) }}, Gzip, nil
	case bytes.Equal(head, zstdMagic):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, Zstd, damaged("zstd", err)
		}
		return &unpacker{read: z.Read, format: "zstd", free: z.Close}, Zstd, nil
	}
	return io.NopCloser(br), Uncompressed, nil
}

// unpacker gives the errors of a decoder their kind. Those of the source pass
// through with their own.
type unpacker struct {
	read   func([]byte) (int, error)
	format string
	free   func()
}

func (u *unpacker) Read(p []byte) (int, error) {
	n, err := u.read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = damaged(u.format, err)
	}
	return n, err
}

func (u *unpacker) Close() error {
	if u.free != nil {
		u.free()
		u.free = nil
	}
	return nil
}

// damaged gives a decoder's error its kind. An error that came through from
// the source has a kind, or is the context's, already.
func damaged(format string, err error) error {
	if errdefs.Has(err) {
		return fmt.Errorf("%s stream: %w", format, err)
	}
	return fmt.Errorf("%s stream is damaged or cut short: %w: %w", format, err, errdefs.ErrInvalidArgument)
}

// Compress returns a writer that compresses to w. Close ends the stream, not
// w. The bytes depend on the input alone.
func Compress(w io.Writer, c Compression) (io.WriteCloser, error) {
	switch c {
	case Gzip:
		return gzip.NewWriterLevel(w, gzip.DefaultCompression)
	case Zstd:
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	case Uncompressed:
		return nopCloser{w}, nil
	}
	return nil, fmt.Errorf("compression %q is unknown: %w", c, errdefs.ErrInvalidArgument)
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
