package testkit

import "fmt"

// MakeMany is an image of layers with so many small files each, no two alike,
// in folders of a hundred.
func MakeMany(layers, files int) (Image, error) {
	return layered(fmt.Sprintf("many-%dx%d", layers, files), Gzip, layers, func(b *LayerBuilder, i int) {
		dir := ""
		for k := range files {
			if k%100 == 0 {
				dir = fmt.Sprintf("part%d/%05d", i, k/100)
				b.Dir(dir, 0o755)
			}
			b.File(fmt.Sprintf("%s/file-%02d.txt", dir, k%100), 0o644, fmt.Appendf(nil, "file %d of layer %d\n", k, i))
		}
	})
}
