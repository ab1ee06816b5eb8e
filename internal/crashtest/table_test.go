package crashtest

import (
	"testing"

	"varve.dev/internal/tables"
)

// table is one of the tables in docs/CRASH.md that the campaigns write.
type table struct {
	name string
	head row
}

type row = tables.Row

func (in table) page() tables.Table {
	return tables.Table{Page: "../../docs/CRASH.md", Name: in.name, Head: in.head}
}

// tell logs a row and, if a campaign is on record, writes it.
func tell(t *testing.T, in table, what interface{ Row() row }) {
	t.Helper()
	in.page().Tell(t, what.Row())
}

// The tables can be written: each has its place.
func TestTablesHaveTheirPlaces(t *testing.T) {
	for _, in := range []table{powerCutTable, plantedTable, longPullTable, cutBuildTable} {
		in.page().Check(t)
	}
}
