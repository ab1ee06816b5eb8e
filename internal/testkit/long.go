package testkit

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// Long is an image of few large files, one in each layer, that do not
// compress. size is in bytes.
func Long(t testing.TB, layers, size int) Image {
	t.Helper()
	img, err := layered(fmt.Sprintf("long-%dx%d", layers, size), Gzip, layers, func(b *LayerBuilder, i int) {
		data := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(data)
		b.File(fmt.Sprintf("large-%d", i), 0o644, data)
	})
	return must(t, img, err)
}
