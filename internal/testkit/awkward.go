package testkit

import (
	"archive/tar"
	"cmp"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Awkward is an image of 12 layers that holds what the OCI layer
// specification allows and careless unpackers get wrong. Its layers are
// gzip, zstd and plain tar in turn.
//
// Left out is what unpackers legitimately disagree about: an implied directory
// where a lower layer has a symlink, a whiteout after the file it names in the
// same layer, times before 1970, and files in GNU's old sparse format, which
// containerd and dockerd refuse ([GNUSparseLayer] has one). What it holds has one right answer, that of
// unpacking layer by layer into one folder; only the times of directories that
// a layer implies and does not list are open.
func Awkward(t testing.TB) Image {
	t.Helper()
	img, err := MakeAwkward()
	return must(t, img, err)
}

// awkwardLayers, in order. Their names say which rule each is about; later
// ones build upon files of the earlier ones.
var awkwardLayers = []struct {
	name string
	how  Compression
	fill func(*LayerBuilder)
}{
	{"base", Gzip, awkwardBase},
	{"attributes", Zstd, awkwardAttributes},
	{"nodes", Plain, awkwardNodes},
	{"names", Gzip, awkwardNames},
	{"sparse", Zstd, awkwardSparse},
	{"whiteouts", Gzip, awkwardWhiteouts},
	{"opaque", Plain, awkwardOpaque},
	{"hardlinks into lower layers", Gzip, awkwardLinks},
	{"type changes", Zstd, awkwardTypes},
	{"implied directories", Gzip, awkwardImplied},
	{"nothing", Gzip, func(*LayerBuilder) {}},
	{"duplicates", Plain, awkwardDuplicates},
}

// MakeAwkward is [Awkward] outside tests.
func MakeAwkward() (Image, error) { return makeAwkward("awkward", "") }

// AwkwardWithout is [Awkward] without the layers of these names, which some
// engine cannot unpack, and with all of them stored in one way.
func AwkwardWithout(t testing.TB, how Compression, names ...string) Image {
	t.Helper()
	img, err := makeAwkward("awkward-part", how, names...)
	return must(t, img, err)
}

func makeAwkward(name string, how Compression, without ...string) (Image, error) {
	inputs := append([]string{"2"}, without...)
	if how != "" {
		inputs = append(inputs, string(how))
	}
	return cached(name, inputs, func(l *Layout) (Image, error) {
		var layers []Layer
		for _, step := range awkwardLayers {
			if slices.Contains(without, step.name) {
				continue
			}
			layer, err := l.AddLayer(cmp.Or(how, step.how), step.name, step.fill)
			if err != nil {
				return Image{}, err
			}
			layers = append(layers, layer)
		}
		manifest, err := l.AddImage(ocispec.ImageConfig{Cmd: []string{"/bin/true"}}, layers...)
		if err != nil {
			return Image{}, err
		}
		return l.Finish(name+":latest", manifest)
	})
}

// netBindService is the security.capability value of cap_net_bind_service=ep:
// revision 2 with the effective bit, then permitted and inheritable, low and
// high words, little-endian (linux/capability.h, struct vfs_cap_data).
const netBindService = "\x01\x00\x00\x02" + "\x00\x04\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00"

// The parents under which later layers imply directories. Root, mode 0755 is
// what an unpacker makes up; nothing here is that.
var (
	oddOwner = Owner(12345, 54321)
	oddXattr = Xattr("user.odd", "kept by those below")
)

func awkwardBase(b *LayerBuilder) {
	b.Dir("./", 0o755)
	for _, d := range []string{"bin", "etc", "data", "gone", "gone/deep", "opaque", "opaque/sub", "types", "types/dir", "types/dir/sub"} {
		b.Dir(d, 0o755)
	}
	b.Text("etc/kept", "from the base\n")
	b.Text("etc/removed", "to be whited out\n")
	b.Text("etc/replaced", "old\n")
	b.Symlink("etc/link", "kept")
	b.Symlink("etc/dangling", "/nowhere/at/all")
	b.Symlink("etc/removed-link", "kept")
	b.Text("gone/file", "x")
	b.Text("gone/deep/file", "y")
	b.Text("opaque/old", "hidden later\n")
	b.Text("opaque/both", "old\n")
	b.Text("opaque/sub/old", "hidden later\n")
	b.Text("types/dir/sub/file", "inside\n")
	b.Text("types/file", "a file\n")
	b.Symlink("types/link", "dir")
	b.Text("types/pipe", "to become a fifo\n")
	b.Dir("types/todevice", 0o755)
	b.Text("data/one", "shared inode\n")
	b.Hardlink("data/two", "data/one")
	b.Hardlink("data/three", "/data/two")
	b.Symlink("data/sym", "one")
	b.Hardlink("data/sym-again", "data/sym", Mode(0o777))
	b.Dir("odd", 0o1731, oddOwner, oddXattr)
	b.Dir("odd/inner", 0o2705, oddOwner, oddXattr, MTime(Epoch.Add(123456789)))
	b.Text("odd/inner/removed", "x")
	b.Dir("closed", 0)
	b.Text("closed/readable-by-root", "inside a directory of mode 0\n")
	b.Text("empty", "")
}

func awkwardAttributes(b *LayerBuilder) {
	b.Dir("attr", 0o755, Xattr("user.on-a-directory", "yes"))
	b.File("attr/setuid", 0o4755, []byte("#!\n"), Owner(1000, 1000))
	b.File("attr/setgid", 0o2755, []byte("#!\n"), Owner(1000, 1000))
	b.File("attr/both", 0o6711, []byte("#!\n"), Owner(7, 8))
	b.Dir("attr/sticky", 0o1777)
	b.Dir("attr/setgid-dir", 0o2775, Owner(0, 50))
	b.File("attr/unreadable", 0, []byte("mode 0\n"))
	b.File("attr/capable", 0o755, []byte("#!\n"), Owner(1000, 0), Xattr("security.capability", netBindService))
	b.Text("attr/many", "", Xattr("user.a", "1"), Xattr("user.b", ""), Xattr("user.binary", "\x00\xff\n=\x01"),
		Xattr("user.long", strings.Repeat("v", 1500)))
	b.Text("attr/large-ids", "", Owner(2_000_000_000, 4_294_967_293))
	b.Text("attr/nanoseconds", "", MTime(time.Unix(1_700_000_000, 123_456_789)))
	b.Text("attr/one-nanosecond", "", MTime(time.Unix(1_700_000_000, 1)))
	b.Text("attr/after-2038", "", MTime(time.Unix(4_000_000_000, 0)))
	b.Text("attr/at-the-epoch", "", MTime(time.Unix(0, 0)))
	b.Symlink("attr/timed-link", "setuid", Owner(1000, 1000), MTime(time.Unix(1_600_000_000, 5)))
	b.Dir("attr/timed-dir", 0o755, MTime(time.Unix(1_500_000_000, 7)))
	b.Text("attr/timed-dir/child", "comes after its directory's entry\n")
}

func awkwardNodes(b *LayerBuilder) {
	b.Dir("dev", 0o755)
	b.Node(tar.TypeChar, "dev/null", 0o666, 1, 3)
	b.Node(tar.TypeChar, "dev/tty", 0o620, 5, 0, Owner(0, 5))
	b.Node(tar.TypeBlock, "dev/loop300", 0o660, 7, 300, Owner(0, 6))
	b.Node(tar.TypeFifo, "dev/fifo", 0o600, 0, 0, MTime(time.Unix(1_700_000_000, 42)))
	b.Node(tar.TypeFifo, "dev/fifo-setgid", 0o2640, 0, 0, Owner(1000, 1000))
}

func awkwardNames(b *LayerBuilder) {
	deep := "long"
	b.Dir(deep, 0o755)
	for range 6 {
		deep += "/" + strings.Repeat("d", 200)
		b.Dir(deep, 0o755)
	}
	b.Text(deep+"/"+strings.Repeat("f", 255), "1,461 bytes of path\n")
	b.Text("long/"+strings.Repeat("g", 255), "", GNU)
	// 1,000 and not 4,095: xfs keeps at most 1,024 in a symbolic link.
	b.Symlink("long/link", strings.Repeat("t/", 500))
	b.Hardlink("long/hard", deep+"/"+strings.Repeat("f", 255))
	b.Dir("names", 0o755)
	b.Text("names/caf\u00e9", "composed\n")
	b.Text("names/cafe\u0301", "decomposed\n")
	b.Text("names/\u6f22\u5b57-\U0001f40b", "")
	b.Text("names/new\nline", "")
	b.Text("names/back\\slash \"quoted\" 'and' |pipe", "")
	b.Text("names/ spaces ", "")
	b.Text("names/latin1-\xe9\xff", "not UTF-8\n", GNU)
	b.Text("names/-rf", "")
	b.Text("names/...", "")
	b.Text("names/.whx", "not a whiteout\n")
	b.Text("names/x.wh.y", "not a whiteout either\n")
	b.Symlink("names/to-unicode", "\u6f22\u5b57")
}

// The contents of the sparse files sparse/pax, sparse/tail and sparse/gnu.
var (
	SparsePAX  = Hole{Size: 3 << 20, Offset: 2<<20 + 1, Data: []byte(strings.Repeat("piece ", 300))}
	SparseTail = Hole{Size: 4<<20 + 3, Offset: 0, Data: []byte("nothing but a hole follows\n")}
	SparseGNU  = Hole{Size: 1<<20 + 5, Offset: 512 << 10, Data: []byte("in the middle of a megabyte\n")}
)

// GNUSparseLayer is the tar stream of a layer with a file in GNU's old sparse
// format, "sparse/gnu", between two plain ones.
func GNUSparseLayer() ([]byte, error) {
	return Tar(func(b *LayerBuilder) {
		b.Text("sparse/before", "")
		b.GNUSparse("sparse/gnu", SparseGNU)
		b.Text("sparse/after", "the stream is still in step\n")
	})
}

func awkwardSparse(b *LayerBuilder) {
	b.Dir("sparse", 0o755)
	b.PAXSparse("sparse/pax", SparsePAX)
	b.PAXSparse("sparse/tail", SparseTail)
	b.File("sparse/zeros", 0o644, make([]byte, 256<<10))
	b.Text("sparse/after", "the stream is still in step\n")
}

func awkwardWhiteouts(b *LayerBuilder) {
	b.Whiteout("etc/removed")
	b.Whiteout("etc/removed-link")
	b.Whiteout("gone")
	b.Whiteout("etc/never-there")
	// Removed and made again: nothing of the old directory shows.
	b.Whiteout("opaque/sub")
	b.Dir("opaque/sub", 0o700)
	b.Text("opaque/sub/new", "made after the whiteout\n")
	b.Whiteout("etc/replaced")
	b.Text("etc/replaced", "new\n")
}

func awkwardOpaque(b *LayerBuilder) {
	// The marker may stand before or after what the layer adds.
	b.Dir("opaque", 0o750, Owner(3, 4))
	b.Text("opaque/both", "new\n")
	b.Opaque("opaque")
	b.Text("opaque/after", "listed after the marker\n")
	b.Dir("opaque/nested", 0o755)
	b.Dir("opaque/nested/more", 0o755)
	b.Text("opaque/nested/more/file", "")
	b.Dir("opaque/fresh", 0o755)
	b.Opaque("opaque/fresh")
}

func awkwardLinks(b *LayerBuilder) {
	b.Dir("links", 0o755)
	b.Hardlink("links/into-base", "etc/kept")
	b.Hardlink("links/again", "links/into-base")
	b.Hardlink("links/capable", "attr/capable", Mode(0o755), Owner(1000, 0), Xattr("security.capability", netBindService))
	b.Hardlink("links/setuid", "./attr/setuid", Mode(0o4755), Owner(1000, 1000))
	b.Hardlink("links/timed", "attr/nanoseconds", MTime(time.Unix(1_700_000_000, 123_456_789)))
	b.Hardlink("links/fifo", "dev/fifo", Mode(0o600), MTime(time.Unix(1_700_000_000, 42)))
	// The lower name goes, the new one stays.
	b.Hardlink("links/survivor", "data/three")
	b.Whiteout("data/three")
	b.Text("links/local", "in this layer\n")
	b.Hardlink("links/local-again", "links/local")
	// The first name gets another inode, the second keeps the old one.
	b.Text("links/split", "first\n")
	b.Hardlink("links/split-kept", "links/split")
	b.Text("links/split", "second\n")
}

func awkwardTypes(b *LayerBuilder) {
	b.Text("types/dir", "a file where a directory was\n")
	b.Dir("types/file", 0o711)
	b.Text("types/file/child", "below what was a file\n")
	b.Dir("types/link", 0o755)
	b.Text("types/link/child", "below what was a symbolic link\n")
	b.Node(tar.TypeFifo, "types/pipe", 0o644, 0, 0)
	b.Node(tar.TypeChar, "types/todevice", 0o600, 1, 5)
	b.Symlink("etc/replaced", "kept")
	b.Text("etc/link", "a file where a link was\n")
	b.Symlink("attr/sticky", "setgid-dir")
}

func awkwardImplied(b *LayerBuilder) {
	// None of these lists its directory.
	b.Text("odd/new", "below an odd directory\n")
	b.Text("odd/inner/new", "below two\n")
	b.Whiteout("odd/inner/removed")
	b.Text("odd/made/up/file", "made is 0755 and root's\n")
	b.Text("closed/more", "")
	b.Hardlink("attr/setgid-dir/linked", "etc/kept")
	b.Text("/absolute", "a name from the root\n")
	b.Text("./dotted", "")
	b.Text("./odd/./inner//slashes", "")
	b.Text("data/../upwards", "stays inside\n")
	b.Symlink("toetc", "etc")
	b.Text("toetc/through", "through a link of this layer\n")
}

func awkwardDuplicates(b *LayerBuilder) {
	b.Dir("dup", 0o755)
	b.Text("dup/file", "first\n", Xattr("user.stale", "must not stay"))
	b.File("dup/file", 0o600, []byte("last\n"), Owner(9, 9))
	b.Text("dup/becomes-dir", "x")
	b.Dir("dup/becomes-dir", 0o755)
	b.Text("dup/becomes-dir/child", "")
	b.Dir("dup/becomes-file", 0o755)
	b.Text("dup/becomes-file/child", "")
	b.Text("dup/becomes-file", "y")
	b.Dir("dup", 0o770, Owner(1, 2), MTime(time.Unix(1_700_000_001, 9)))
	b.Dir("etc", 0o751) // only its attributes change
}
