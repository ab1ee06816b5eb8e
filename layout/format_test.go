package layout_test

import (
	"bytes"
	"flag"
	"os"
	"testing"

	"varve.dev/layout"
)

var update = flag.Bool("update", false, "write docs/FORMAT.md")

const formatPage = "../docs/FORMAT.md"

func TestFormatPageIsPrinted(t *testing.T) {
	var want bytes.Buffer
	layout.Print(&want)
	if *update {
		if err := os.MkdirAll("../docs", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(formatPage, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(formatPage)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Error("docs/FORMAT.md is not what package layout says: go test ./layout -update")
	}
}

func TestIdentitiesAreUnique(t *testing.T) {
	seen := map[string]bool{}
	add := func(id string) {
		if seen[id] {
			t.Errorf("%s stands for two things", id)
		}
		seen[id] = true
	}
	for _, i := range layout.Invariants() {
		add(i.ID)
		if i.Holds == "" || i.Repair == "" {
			t.Errorf("%s says nothing", i.ID)
		}
	}
	for _, tr := range layout.Transitions() {
		add(tr.ID)
		add(tr.Point)
	}
}

// A value that is put under another key, or changed in one bit, is found.
func TestCodecFindsDamage(t *testing.T) {
	rec := layout.BlobRecord{Size: 5}
	value, err := layout.Encode("key", rec)
	if err != nil {
		t.Fatal(err)
	}
	var got layout.BlobRecord
	if err := layout.Decode("blobs", "key", value, &got); err != nil || got.Size != 5 {
		t.Fatalf("decode: %+v, %v", got, err)
	}
	if layout.Decode("blobs", "other", value, &got) == nil {
		t.Error("a value under another key decodes")
	}
	for i := range value {
		for bit := range 8 {
			value[i] ^= 1 << bit
			if layout.Decode("blobs", "key", value, &got) == nil {
				t.Errorf("bit %d of byte %d flipped, and it decodes", bit, i)
			}
			value[i] ^= 1 << bit
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00{}"))
	f.Fuzz(func(t *testing.T, value []byte) {
		var rec layout.IntentRecord
		_ = layout.Decode("intents", "key", value, &rec)
	})
}
