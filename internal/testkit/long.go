package testkit

import (
	"fmt"
	"math/rand/v2"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Long is an image of few large files, one in each layer, that do not
// compress. size is in bytes.
func Long(t testing.TB, layers, size int) Image {
	t.Helper()
	name := fmt.Sprintf("long-%dx%d", layers, size)
	img, err := cached(name, []string{"1"}, func(l *Layout) (Image, error) {
		var stack []Layer
		for i := range layers {
			layer, err := l.AddLayer(Gzip, fmt.Sprintf("layer %d", i), func(b *LayerBuilder) {
				data := make([]byte, size)
				_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(data)
				b.File(fmt.Sprintf("large-%d", i), 0o644, data)
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
