package layout

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"

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

// Decode reads what [Encode] wrote under the same key. A value that fails is
// reported as Corrupt, invariant M1.
func Decode(bucket, key string, value []byte, record any) error {
	corrupt := func(detail string) error {
		return &errdefs.Corrupt{Invariant: "M1", Object: fmt.Sprintf("record %s/%q", bucket, key), Detail: detail}
	}
	if len(value) < checksumLen {
		return corrupt(fmt.Sprintf("value is %d bytes long", len(value)))
	}
	body := value[checksumLen:]
	if got, want := sum(key, body), binary.BigEndian.Uint32(value); got != want {
		return corrupt(fmt.Sprintf("checksum %08x, stored %08x", got, want))
	}
	if err := json.Unmarshal(body, record); err != nil {
		return corrupt(err.Error())
	}
	return nil
}

func sum(key string, body []byte) uint32 {
	return crc32.Update(crc32.Checksum([]byte(key), castagnoli), castagnoli, body)
}
