package testkit

import (
	"bytes"
	"fmt"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Heavy is an image that is small to fetch and large to unpack: each layer is
// one file of so many MiB.
func Heavy(t testing.TB, layers, mibEach int) Image {
	t.Helper()
	name := fmt.Sprintf("heavy-%dx%d", layers, mibEach)
	img, err := cached(name, []string{"1"}, func(l *Layout) (Image, error) {
		var stack []Layer
		for i := range layers {
			line := fmt.Appendf(nil, "%-1023d\n", i)
			layer, err := l.AddLayer(Zstd, fmt.Sprintf("layer %d", i), func(b *LayerBuilder) {
				b.File(fmt.Sprintf("file-%d", i), 0o644, bytes.Repeat(line, mibEach<<10))
			})
			if err != nil {
				return Image{}, err
			}
			stack = append(stack, layer)
		}
		manifest, err := l.AddImage(ocispec.ImageConfig{Cmd: []string{"true"}}, stack...)
		if err != nil {
			return Image{}, err
		}
		return l.Finish(name+":latest", manifest)
	})
	return must(t, img, err)
}
