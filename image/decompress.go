package image

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"varve.dev/errdefs"
)

// maxWindow bounds what a zstd frame may make its reader keep: that of
// zstd --long=27, which is as far as the format asks decoders to go.
const maxWindow = 128 << 20

// errBadStream marks bytes that do not decompress.
var errBadStream = fmt.Errorf("cannot be decompressed: %w", errdefs.ErrInvalidArgument)

// decompress returns the tar stream in a layer blob. It goes by the first
// bytes and not by the media type: tools have written zstd as "gzip" and gzip
// as "tar", and every engine in use takes them. A tar archive cannot begin
// with either magic number: there stands its first file's name.
func decompress(blob io.Reader) (io.ReadCloser, error) {
	buffered := bufio.NewReaderSize(blob, 256<<10)
	magic, err := buffered.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case isGzip(magic):
		z, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errBadStream)
		}
		return &inflating{z, z.Close}, nil
	case isZstd(magic):
		z, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errBadStream)
		}
		return &inflating{z, func() error { z.Close(); return nil }}, nil
	}
	return io.NopCloser(buffered), nil
}

func isGzip(magic []byte) bool { return bytes.HasPrefix(magic, []byte{0x1f, 0x8b}) }             // RFC 1952, 2.3.1
func isZstd(magic []byte) bool { return bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}) } // RFC 8878, 3.1.1

// inflating marks a decoder's own errors. Those of the stream below it, which
// decoders hand through, keep their kind.
type inflating struct {
	io.Reader
	close func() error
}

func (i *inflating) Read(p []byte) (int, error) {
	n, err := i.Reader.Read(p)
	if err != nil && err != io.EOF && kindOf(err) != nil {
		err = fmt.Errorf("%w: %w", err, errBadStream)
	}
	return n, err
}

func (i *inflating) Close() error { return i.close() }
