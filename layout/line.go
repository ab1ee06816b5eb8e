package layout

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"

	"varve.dev/errdefs"
)

// lineSum is the length of a line's checksum and the space after it.
const lineSum = 9

// EncodeLine returns a change as a line of the log, its newline included.
func EncodeLine(c ChangeRecord) ([]byte, error) {
	body, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("change %d: %w: %w", c.Seq, err, errdefs.ErrInternal)
	}
	return fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(body, castagnoli), body), nil
}

// DecodeLine reads a line, with its newline or without. Errors are of kind
// ErrDataLoss.
func DecodeLine(line []byte) (c ChangeRecord, err error) {
	line = bytes.TrimSuffix(line, []byte{'\n'})
	if len(line) < lineSum || line[lineSum-1] != ' ' {
		return c, fmt.Errorf("no checksum: %w", errdefs.ErrDataLoss)
	}
	want, err := strconv.ParseUint(string(line[:lineSum-1]), 16, 32)
	body := line[lineSum:]
	if got := crc32.Checksum(body, castagnoli); err != nil || uint64(got) != want {
		return c, fmt.Errorf("checksum %08x, the line says %q: %w", got, line[:lineSum-1], errdefs.ErrDataLoss)
	}
	if err := json.Unmarshal(body, &c); err != nil {
		return c, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	return c, nil
}

// maxLine is more than any commit has to tell. In bytes.
const maxLine = 256 << 20

// ReadLine reads a line of the log with its newline. What is longer than any
// line is not read into memory to find out: ErrDataLoss. The error at the end,
// or of a line without one, is io.EOF.
func ReadLine(r *bufio.Reader) (line []byte, err error) {
	for {
		part, err := r.ReadSlice('\n')
		if line = append(line, part...); !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
		if len(line) > maxLine {
			return nil, fmt.Errorf("longer than %d bytes: %w", maxLine, errdefs.ErrDataLoss)
		}
	}
}

// TailKey is the key of a change in BucketLogTail.
func TailKey(seq uint64) string { return fmt.Sprintf("%016x", seq) }
