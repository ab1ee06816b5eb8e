package crashtest

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// table is one of the tables in docs/CRASH.md that the campaigns write. It
// stands there between two comments with its name.
type table struct {
	name string
	head row
}

// row is one line of a table. Its first two fields say what it is about: a new
// one takes the place of the one before.
type row []string

func (r row) String() string { return "| " + strings.Join(r, " | ") + " |" }

func (r row) row() row { return r }

// recordVariable, in the environment, asks for the tables to be written.
const recordVariable = "VARVE_RECORD"

const tablesFile = "../../docs/CRASH.md"

// tell logs a row and, if a campaign is on record, writes it.
func tell(t *testing.T, in table, what interface{ row() row }) {
	t.Helper()
	r := what.row()
	for i, field := range r {
		t.Logf("%s: %s", in.head[i], field)
	}
	if os.Getenv(recordVariable) == "" || t.Failed() {
		return
	}
	data, err := os.ReadFile(tablesFile)
	if err != nil {
		t.Fatal(err)
	}
	page, err := in.put(string(data), r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tablesFile, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
}

// put returns the page with the row in its table.
func (in table) put(page string, r row) (string, error) {
	begin, end := "<!-- "+in.name+" -->\n", "<!-- /"+in.name+" -->"
	before, rest, ok := strings.Cut(page, begin)
	old, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return "", fmt.Errorf("%s has no place for the table %q", tablesFile, in.name)
	}
	rows := []string{in.head.String(), "|" + strings.Repeat("---|", len(in.head)), r.String()}
	key := row(r[:2]).String()
	for _, line := range strings.Split(strings.TrimSpace(old), "\n")[min(2, strings.Count(old, "\n")):] {
		if line != "" && !strings.HasPrefix(line, key) {
			rows = append(rows, line)
		}
	}
	slices.Sort(rows[2:])
	return before + begin + strings.Join(rows, "\n") + "\n" + end + after, nil
}

// The tables can be written: each has its place.
func TestTablesHaveTheirPlaces(t *testing.T) {
	page, err := os.ReadFile(tablesFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range []table{powerCutTable, plantedTable, longPullTable} {
		r := make(row, len(in.head))
		if _, err := in.put(string(page), r); err != nil {
			t.Error(err)
		}
	}
	in := table{"x", row{"a", "b", "c"}}
	got := "<!-- x -->\n<!-- /x -->"
	for _, r := range []row{{"2", "2", "old"}, {"1", "1", "only"}, {"2", "2", "new"}} {
		if got, err = in.put(got, r); err != nil {
			t.Fatal(err)
		}
	}
	if want := "<!-- x -->\n| a | b | c |\n|---|---|---|\n| 1 | 1 | only |\n| 2 | 2 | new |\n<!-- /x -->"; got != want {
		t.Errorf("%s", got)
	}
}
