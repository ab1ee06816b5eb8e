package testkit

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The shape of the big image, that of a usual application image: few large
// files make most of the bytes, many small ones most of the names, and about
// half of it does not compress.
const (
	bigLayers         = 9
	bigFilesPerLayer  = 3889 // 35,001 in all
	bigDirsPerLayer   = 260
	bigIncompressible = 45 // percent of the bytes
)

// Big is 1 GB in 9 gzip layers and 35,001 files, about 547 MB compressed.
// Making it takes about a minute of two cores; it is made once.
func Big(t testing.TB) Image {
	t.Helper()
	img, err := MakeBig()
	return must(t, img, err)
}

// MakeBig is [Big] outside tests.
func MakeBig() (Image, error) {
	return cached("big", []string{"1"}, func(l *Layout) (Image, error) {
		layers := make([]Layer, bigLayers)
		errs := make([]error, bigLayers)
		slots := make(chan struct{}, runtime.NumCPU())
		var wg sync.WaitGroup
		for i := range bigLayers {
			slots <- struct{}{}
			wg.Go(func() {
				layers[i], errs[i] = l.AddLayer(Gzip, fmt.Sprintf("big layer %d", i), func(b *LayerBuilder) { fillBig(b, i) })
				<-slots
			})
		}
		wg.Wait()
		for _, err := range errs {
			if err != nil {
				return Image{}, err
			}
		}
		manifest, err := l.AddImage(ocispec.ImageConfig{Cmd: []string{"/bin/true"}}, layers...)
		if err != nil {
			return Image{}, err
		}
		return l.Finish("big:latest", manifest)
	})
}

func fillBig(b *LayerBuilder, layer int) {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], uint64(layer)+1)
	random := rand.NewChaCha8(seed)
	pick := rand.New(random)
	root := fmt.Sprintf("app%d", layer)
	b.Dir(root, 0o755)
	dirs := []string{root}
	for i := range bigDirsPerLayer {
		parent := dirs[pick.IntN(len(dirs))]
		// Deep trees exist, but not a chain of 260.
		if len(parent) > 60 {
			parent = root
		}
		dirs = append(dirs, fmt.Sprintf("%s/d%03d", parent, i))
		b.Dir(dirs[i+1], 0o755)
	}
	buf := make([]byte, 0, 1<<20)
	for i := range bigFilesPerLayer {
		name := fmt.Sprintf("%s/f%05d", dirs[pick.IntN(len(dirs))], i)
		buf = halfRandom(buf[:0], bigSize(pick), random, pick)
		b.File(name, 0o644, buf)
	}
}

// bigSize draws a size: one file in twenty is large and holds most of the
// bytes. The mean is about 29 kB.
func bigSize(pick *rand.Rand) int {
	if pick.IntN(20) == 0 {
		return 40_000 + pick.IntN(780_000)
	}
	return pick.IntN(14_000)
}

// halfRandom appends n bytes: pieces that do not compress between pieces of
// words that compress well.
func halfRandom(buf []byte, n int, random io.Reader, pick *rand.Rand) []byte {
	for len(buf) < n {
		piece := min(512+pick.IntN(3584), n-len(buf))
		start := len(buf)
		buf = append(buf, make([]byte, piece)...)
		if pick.IntN(100) < bigIncompressible {
			_, _ = random.Read(buf[start:]) // ChaCha8 never fails
			continue
		}
		for at := start; at < len(buf); {
			at += copy(buf[at:], words[pick.IntN(len(words))])
		}
	}
	return buf
}

var words = []string{
	"return ", "error ", "func ", "string ", "    ", "context.Context", "if err != nil {\n", "}\n\n", "package ", "import ",
	"the ", "of ", "and ", "layer ", "0x00 ", "const ", "type ", "struct {\n", "interface", "// ",
}
