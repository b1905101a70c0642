"""attune mask: pictures of biases."""

import xml.etree.ElementTree

from harness import CommandTest, main

SVG = "{http://www.w3.org/2000/svg}"


class Mask(CommandTest):

    def mask(self, *arguments):
        return self.attune_json("mask", *arguments)

    def test_terminal(self):
        text = self.attune("mask", "BlockDiagonalCausalMask", "--q-seqlen", "2,1", "--kv-seqlen", "3,1").out
        self.assertEqual(text, "BlockDiagonalCausalMask: 3 queries x 4 keys, 4 visible (33.3 %)\n"
                               "    0      3\n"
                               "   ┌──────┬──┐\n"
                               " 0 │██····│··│\n"
                               " 1 │████··│··│\n"
                               "   ├──────┼──┤\n"
                               " 2 │······│██│\n"
                               "   └──────┴──┘\n")

    def test_more_keys_than_columns_are_drawn_in_half_blocks(self):
        text = self.attune("mask", "LowerTriangularMask", "--queries", "3", "--keys", "150").out
        self.assertEqual(text.splitlines()[1:], ["█▄" + "·" * 148, "▀▀▀" + "·" * 147])

    def test_whole_attention(self):
        local = self.mask("LocalAttentionFromBottomRightMask", "--window-left", "1", "--window-right", "2",
                          "--queries", "4", "--keys", "5")
        self.assertEqual(local, {"class": "LocalAttentionFromBottomRightMask", "queries": 4, "keys": 5,
                                 "visible": 13, "query_borders": [], "key_borders": [],
                                 "rows": ["11110", "01111", "00111", "00011"]})
        size = self.mask("LowerTriangularFromBottomRightLocalAttentionMask", "--window-size", "1",
                         "--queries", "2", "--keys", "3")
        self.assertEqual(size["rows"], ["010", "001"])

    def test_sequences(self):
        padded = self.mask("BlockDiagonalPaddedKeysMask", "--q-seqlen", "1,2", "--kv-padding", "3",
                           "--kv-seqlen", "1,2")
        self.assertEqual(padded["rows"], ["100000", "000110", "000110"])
        self.assertEqual((padded["query_borders"], padded["key_borders"]), ([1], [3]))
        gappy = self.mask("BlockDiagonalGappyKeysMask", "--q-seqlen", "1,1", "--kv-seqstarts", "2,0,4",
                          "--kv-seqlen", "2,1")
        self.assertEqual(gappy["rows"], ["0011", "1000"])
        alone = self.mask("BlockDiagonalMask", "--q-seqlen", "2")
        self.assertEqual(alone["rows"], ["11", "11"])

    def test_pages(self):
        paged = self.mask("PagedBlockDiagonalPaddedKeysMask", "--q-seqlen", "1,1", "--kv-seqlen", "3,1",
                          "--block-tables", "2,0; 1,3", "--page-size", "2")
        self.assertEqual((paged["rows"], paged["key_borders"]), (["10001100", "00100000"], [2, 4, 6]))
        wider = self.mask("PagedBlockDiagonalPaddedKeysMask", "--q-seqlen", "1", "--kv-seqlen", "1",
                          "--block-tables", "0", "--page-size", "2", "--keys", "6")
        self.assertEqual(wider["rows"], ["100000"])

    def test_via(self):
        arguments = ("--q-seqlen", "1,1", "--kv-seqlen", "2,1", "--block-tables", "1;0", "--page-size", "4")
        cells = self.mask("PagedBlockDiagonalGappyKeysMask", "--via", "BlockDiagonalGappyKeysMask.make_paged",
                          "--kv-seqstarts-in-row", "1,0", "--notional-padding", "4", *arguments)
        direct = self.mask("PagedBlockDiagonalGappyKeysMask", "--kv-seqstarts", "1,0", *arguments)
        self.assertEqual(cells, direct)
        self.assertEqual(direct["rows"], ["00000110", "10000000"])

    def test_svg(self):
        path = self.folder / "mask.svg"
        outcome = self.attune("mask", "BlockDiagonalCausalMask", "--q-seqlen", "2,1", "-o", path)
        self.assertEqual(outcome.out, "")
        root = xml.etree.ElementTree.parse(path).getroot()
        self.assertEqual(root.tag, SVG + "svg")
        drawn = [tuple(int(r.get(name)) for name in ("x", "y", "width")) for r in root.findall(SVG + "rect")[1:]]
        self.assertEqual(drawn, [(0, 0, 10), (0, 10, 20), (20, 20, 10)])
        self.assertEqual(len(root.findall(SVG + "line")), 2)

    def test_nothing_to_see(self):
        empty = self.mask("BlockDiagonalMask", "--q-seqlen", "2", "--kv-seqlen", "0")
        self.assertEqual((empty["rows"], empty["visible"]), (["", ""], 0))
        self.assertIn("0 visible (0 %)", self.attune("mask", "LowerTriangularMask", "--queries", "0", "--keys", "0").out)

    def test_mistakes(self):
        for text, arguments in {
            "no bias class Causal; there are LowerTriangularMask, ": ("Causal",),
            "LowerTriangularMask needs --keys N": ("LowerTriangularMask", "--queries", "3"),
            "LowerTriangularMask has no window_size; it takes no arguments":
                ("LowerTriangularMask", "--queries", "3", "--keys", "3", "--window-size", "2"),
            "BlockDiagonalCausalMask needs q_seqlen; it takes q_seqlen, kv_seqlen": ("BlockDiagonalCausalMask",),
            "BlockDiagonalMask is not made via constructor, but via from_seqlens":
                ("BlockDiagonalMask", "--via", "constructor"),
            "Expected `window_size > 0`, but window_size=-1":
                ("BlockDiagonalCausalLocalAttentionMask", "--q-seqlen", "3", "--window-size", "-1"),
            "Block #0 has num_keys=1 and num_queries=2. Expected `num_keys >= num_queries`":
                ("BlockDiagonalCausalFromBottomRightMask", "--q-seqlen", "2", "--kv-seqlen", "1"),
            "--block-tables 0,x: \"x\" is no page; expected rows like \"0,1;2,3\"":
                ("PagedBlockDiagonalPaddedKeysMask", "--q-seqlen", "1", "--kv-seqlen", "1", "--page-size", "2",
                 "--block-tables", "0,x"),
            "block_tables: row 1 has 2 pages, but row 0 has 1":
                ("PagedBlockDiagonalPaddedKeysMask", "--q-seqlen", "1,1", "--kv-seqlen", "1,1", "--page-size", "2",
                 "--block-tables", "0;1,2"),
            "the sequences have 3 rows together, but query has 4":
                ("BlockDiagonalMask", "--q-seqlen", "3", "--queries", "4"),
            "100000 x 100000 pairs are too many to draw, the limit is 2^26":
                ("LowerTriangularMask", "--queries", "100000", "--keys", "100000"),
        }.items():
            with self.subTest(text=text):
                self.assert_fails(2, text, "mask", *arguments)


if __name__ == "__main__":
    main()
