package layout

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"hash/fnv"

	"varve.dev/errdefs"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksumLen is the length of the CRC-32C, big-endian, that begins a value.
const checksumLen = 4

// Encode returns a record as it is stored: CRC-32C of key and JSON, then the
// JSON. The key is part of the sum so that a value under another's key is
// found; bbolt itself has no checksum on its data pages.
func Encode(key string, record any) ([]byte, error) {
	body, err := json.Marshal(record)
	if err != nil {
		return nil, fmt.Errorf("encode record of %q: %w: %w", key, err, errdefs.ErrInternal)
	}
	out := make([]byte, checksumLen, checksumLen+len(body))
	binary.BigEndian.PutUint32(out, sum(key, body))
	return append(out, body...), nil
}

// Body returns the JSON of an encoded record, which need not be whole.
func Body(value []byte) []byte { return value[min(checksumLen, len(value)):] }

// Decode reads what [Encode] wrote under the same key. A value that fails is
// reported as Corrupt, invariant M1.
func Decode(bucket, key string, value []byte, record any) error {
	if err := CheckSum(bucket, key, value); err != nil {
		return err
	}
	if err := json.Unmarshal(Body(value), record); err != nil {
		return corruptRecord(bucket, key, err.Error())
	}
	return nil
}

// CheckSum compares a value with its checksum; see [Decode].
func CheckSum(bucket, key string, value []byte) error {
	if len(value) < checksumLen {
		return corruptRecord(bucket, key, fmt.Sprintf("value is %d bytes long", len(value)))
	}
	if got, want := sum(key, Body(value)), binary.BigEndian.Uint32(value); got != want {
		return corruptRecord(bucket, key, fmt.Sprintf("checksum %08x, stored %08x", got, want))
	}
	return nil
}

// EntrySum is what an entry adds to the sum of its bucket: FNV-1a, 64 bits, of
// the key and of the checksum that begins the value. Sums wrap around. The
// order in which entries came does not matter, so a writer adds and subtracts
// what it changes; a page that lost some of them, has some twice or is an old
// one gives another sum.
func EntrySum(key, value []byte) uint64 {
	h := fnv.New64a()
	h.Write(key) // never fails; see hash.Hash
	h.Write(value[:min(checksumLen, len(value))])
	return h.Sum64()
}

func corruptRecord(bucket, key, detail string) error {
	return &errdefs.Corrupt{Invariant: "M1", Object: fmt.Sprintf("record %s/%q", bucket, key), Detail: detail}
}

func sum(key string, body []byte) uint32 {
	return crc32.Update(crc32.Checksum([]byte(key), castagnoli), castagnoli, body)
}
