package testkit

import (
	"archive/tar"
	"bytes"
	"fmt"
)

// Hole is a file of Size bytes that holds Data at Offset and zeros elsewhere.
type Hole struct {
	Size   int64
	Offset int64
	Data   []byte
}

// Bytes is the whole content, for comparing.
func (h Hole) Bytes() []byte {
	all := make([]byte, h.Size)
	copy(all[h.Offset:], h.Data)
	return all
}

// archive/tar reads sparse files and does not write them, so these entries
// are put together block by block, after the GNU tar manual, "Sparse Formats".

// GNUSparse adds a file in the old GNU format: type 'S', the map in the
// header, the data alone in the body.
func (b *LayerBuilder) GNUSparse(name string, h Hole) {
	block := rawHeader(name, 'S', int64(len(h.Data)))
	copy(block[257:], "ustar  \x00") // GNU's magic, not POSIX's
	octal(block[386:398], h.Offset)
	octal(block[398:410], int64(len(h.Data)))
	// A second, empty piece at the end says where the file ends.
	octal(block[410:422], h.Size)
	octal(block[422:434], 0)
	octal(block[483:495], h.Size)
	seal(block)
	b.Raw(append(block, padded(h.Data)...))
}

// PAXSparse adds a file in format 1.0: the name and size in PAX records, the
// map as decimal lines before the data.
func (b *LayerBuilder) PAXSparse(name string, h Hole) {
	records := paxRecord("GNU.sparse.major", "1") +
		paxRecord("GNU.sparse.minor", "0") +
		paxRecord("GNU.sparse.name", name) +
		paxRecord("GNU.sparse.realsize", fmt.Sprint(h.Size))
	pieces := padded(fmt.Appendf(nil, "2\n%d\n%d\n%d\n0\n", h.Offset, len(h.Data), h.Size))

	pax := rawHeader("PaxHeaders/sparse", tar.TypeXHeader, int64(len(records)))
	seal(pax)
	file := rawHeader("GNUSparseFile.0/sparse", tar.TypeReg, int64(len(pieces)+len(h.Data)))
	seal(file)
	b.Raw(bytes.Join([][]byte{pax, padded([]byte(records)), file, pieces, padded(h.Data)}, nil))
}

// rawHeader is a ustar header without its checksum.
func rawHeader(name string, kind byte, size int64) []byte {
	block := make([]byte, 512)
	copy(block[0:100], name)
	octal(block[100:108], 0o644)
	octal(block[108:116], 0)
	octal(block[116:124], 0)
	octal(block[124:136], size)
	octal(block[136:148], Epoch.Unix())
	block[156] = kind
	copy(block[257:], "ustar\x0000")
	return block
}

// seal computes the checksum, over a field that reads as spaces.
func seal(block []byte) {
	copy(block[148:156], "        ")
	var sum int64
	for _, c := range block {
		sum += int64(c)
	}
	copy(block[148:156], fmt.Sprintf("%06o\x00 ", sum))
}

func octal(field []byte, v int64) { copy(field, fmt.Sprintf("%0*o\x00", len(field)-1, v)) }

// paxRecord is "length key=value\n", where length counts itself.
func paxRecord(key, value string) string {
	size := len(key) + len(value) + 3
	for {
		s := fmt.Sprintf("%d %s=%s\n", size, key, value)
		if len(s) == size {
			return s
		}
		size = len(s)
	}
}

func padded(data []byte) []byte {
	return append(bytes.Clone(data), make([]byte, (512-len(data)%512)%512)...)
}
