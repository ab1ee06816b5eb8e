package testkit

import (
	"bytes"
	"fmt"
	"testing"
)

// Heavy is an image that is small to fetch and large to unpack: each layer is
// one file of so many MiB.
func Heavy(t testing.TB, layers, mibEach int) Image {
	t.Helper()
	img, err := layered(fmt.Sprintf("heavy-%dx%d", layers, mibEach), Zstd, layers, func(b *LayerBuilder, i int) {
		line := fmt.Appendf(nil, "%-1023d\n", i)
		b.File(fmt.Sprintf("file-%d", i), 0o644, bytes.Repeat(line, mibEach<<10))
	})
	return must(t, img, err)
}
