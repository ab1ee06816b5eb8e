package testkit

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// MakeMany is an image of layers with so many small files each, no two alike,
// in folders of a hundred.
func MakeMany(layers, files int) (Image, error) {
	name := fmt.Sprintf("many-%dx%d", layers, files)
	return cached(name, []string{"1"}, func(l *Layout) (Image, error) {
		var stack []Layer
		for i := range layers {
			layer, err := l.AddLayer(Gzip, fmt.Sprintf("layer %d", i), func(b *LayerBuilder) {
				dir := ""
				for k := range files {
					if k%100 == 0 {
						dir = fmt.Sprintf("part%d/%05d", i, k/100)
						b.Dir(dir, 0o755)
					}
					b.File(fmt.Sprintf("%s/file-%02d.txt", dir, k%100), 0o644, fmt.Appendf(nil, "file %d of layer %d\n", k, i))
				}
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
}
