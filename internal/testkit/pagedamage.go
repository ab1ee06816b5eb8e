package testkit

import (
	"math/rand/v2"
	"slices"
)

// pageSize is bbolt's on every machine that the tests run on.
const pageSize = 4096

// pageDamage is a way in which one page of a bbolt database goes bad.
type pageDamage struct {
	kind  string
	times int // each with other numbers
	do    func(r *rand.Rand, page []byte, number int, others pagesOf)
}

// pagesOf gives other bytes that a page may have.
type pagesOf struct {
	file []byte   // the database
	old  [][]byte // the same some commits ago
}

var pageDamages = []pageDamage{
	{"zeros", 1, func(_ *rand.Rand, p []byte, _ int, _ pagesOf) { clear(p) }},
	{"ones", 1, func(_ *rand.Rand, p []byte, _ int, _ pagesOf) {
		for i := range p {
			p[i] = 0xff
		}
	}},
	{"noise", 1, func(r *rand.Rand, p []byte, _ int, _ pagesOf) {
		for i := range p {
			p[i] = byte(r.Uint32())
		}
	}},
	{"a bit of the header", 6, func(r *rand.Rand, p []byte, _ int, _ pagesOf) { flip(r, p[:16]) }},
	{"a bit of the elements", 8, func(r *rand.Rand, p []byte, _ int, _ pagesOf) { flip(r, p[16:16+512]) }},
	{"a bit anywhere", 8, func(r *rand.Rand, p []byte, _ int, _ pagesOf) { flip(r, p) }},
	{"fewer elements", 3, func(r *rand.Rand, p []byte, _ int, _ pagesOf) {
		n := int(p[10]) | int(p[11])<<8
		if n > 0 {
			n -= 1 + r.IntN(n)
		}
		p[10], p[11] = byte(n), byte(n>>8)
	}},
	{"as some commits ago", 3, func(r *rand.Rand, p []byte, number int, others pagesOf) {
		if old := others.old[r.IntN(len(others.old))]; len(old) >= (number+1)*pageSize {
			copy(p, old[number*pageSize:])
		}
	}},
	{"another page", 2, func(r *rand.Rand, p []byte, _ int, others pagesOf) {
		copy(p, others.file[r.IntN(len(others.file)/pageSize)*pageSize:])
	}},
	{"another page under its number", 3, func(r *rand.Rand, p []byte, _ int, others pagesOf) {
		copy(p[8:], others.file[r.IntN(len(others.file)/pageSize)*pageSize+8:])
	}},
	{"a branch into itself", 1, func(_ *rand.Rand, p []byte, number int, _ pagesOf) {
		clear(p[24:32]) // the child of the first element
		p[24], p[25] = byte(number), byte(number>>8)
	}},
	{"second half zeros", 1, func(_ *rand.Rand, p []byte, _ int, _ pagesOf) { clear(p[pageSize/2:]) }},
	{"cut off", 1, nil}, // with all later pages
}

func flip(r *rand.Rand, b []byte) { b[r.IntN(len(b))] ^= 1 << r.IntN(8) }

func perPage() (n int) {
	for _, d := range pageDamages {
		n += d.times
	}
	return n
}

// PageDamages is how many cases [DamagePage] has for a database.
func PageDamages(file []byte) int { return len(file) / pageSize * perPage() }

// KindsOfPageDamage returns what [DamagePage] does to pages.
func KindsOfPageDamage() (kinds []string) {
	for _, d := range pageDamages {
		kinds = append(kinds, d.kind)
	}
	return kinds
}

// DamagePage makes case number i of a database: a copy of it in which one page
// is bad. old is what the database was some commits ago.
func DamagePage(file []byte, old [][]byte, i int) (kind string, page int, bad []byte) {
	page, nth := i/perPage(), i%perPage()
	r := rand.New(rand.NewPCG(uint64(i), 1))
	bad = slices.Clone(file)
	for _, d := range pageDamages {
		if nth < d.times {
			if d.do == nil {
				bad = bad[:page*pageSize+r.IntN(pageSize)]
			} else {
				d.do(r, bad[page*pageSize:(page+1)*pageSize], page, pagesOf{file, old})
			}
			return d.kind, page, bad
		}
		nth -= d.times
	}
	panic("more damages than there are")
}
