package testkit

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"
)

// Stacked is an image of many layers that lean on each other: each writes its
// share of files, takes some of the layer below away, replaces a directory,
// links and dresses files with xattrs.
func Stacked(t testing.TB, layers, filesEach int) Image {
	t.Helper()
	img, err := MakeStacked(layers, filesEach)
	return must(t, img, err)
}

// MakeStacked is [Stacked] outside tests.
func MakeStacked(layers, filesEach int) (Image, error) {
	return layered(fmt.Sprintf("stacked-%dx%d", layers, filesEach), Gzip, layers, func(b *LayerBuilder, i int) { fillStacked(b, i, filesEach) })
}

const stackedPerDir = 25

func fillStacked(b *LayerBuilder, layer, files int) {
	pick := rand.New(rand.NewPCG(uint64(layer), 1))
	random := rand.NewChaCha8([32]byte{byte(layer)})
	top := fmt.Sprintf("layer%02d", layer)
	b.Dir(top, 0o755, MTime(time.Unix(1600000000+int64(layer), 123456789)))
	for i := range files {
		dir := fmt.Sprintf("%s/d%03d", top, i/stackedPerDir)
		if i%stackedPerDir == 0 {
			b.Dir(dir, 0o750, Owner(layer, i))
		}
		data := halfRandom(nil, stackedSize(pick), random, pick)
		attrs := []Attr{MTime(time.Unix(1600000000+int64(i), int64(pick.IntN(1e9))))}
		if i%10 == 3 {
			attrs = append(attrs, Xattr("user.note", strconv.Itoa(i)))
		}
		name := fmt.Sprintf("%s/f%04d", dir, i)
		b.File(name, 0o640, data, attrs...)
		if i%20 == 7 {
			b.Hardlink(name+".link", name)
		}
	}
	if layer == 0 {
		b.Text("base", "every layer links here")
		return
	}
	below := fmt.Sprintf("layer%02d", layer-1)
	b.Whiteout(below + "/d000/f0001")
	b.Opaque(below + "/d001")
	b.Hardlink(top+"/base", "base")
}

// stackedSize is mostly below a few pages and now and then much more.
func stackedSize(pick *rand.Rand) int {
	if pick.IntN(50) == 0 {
		return 1 + pick.IntN(600<<10)
	}
	return pick.IntN(12 << 10)
}
